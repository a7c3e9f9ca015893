"""Few-shot tasks: a base, a structure or domain that is new to it, a few images to adapt with and many to test on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.chance import seeded
from fedlora_mini.data import Dataset, Site, Split, keep_classes, load
from fedlora_mini.data.hippocampus import person
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.models.meshnet import quantile_scale

MOST_SHOTS = 10


def _people(site: Site) -> list[str]:
    return [person(case) for case in site.record["cases"]["train"]]


@dataclass(frozen=True)
class Task:
    """`tune` names the task on which an arm's learning rate is chosen; empty: it is such a task and is not reported.

    keep: one class of the data set against everything else; None = all classes. whole: all classes as one.
    group: whom a training image belongs to; the shots come from as many people.
    """

    summary: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    site: str = ""  # "" = the first
    keep: str | None = None
    whole: bool = False
    model: str = "minisam"
    base: str = "auto"
    size: int = 48
    test: int = 48  # at most so many test images
    group: Callable[[Site], list[str]] | None = None
    scale: Callable[[Tensor], Tensor] | None = None  # of the images, where the base was made for another one
    tune: str = ""

    def load(self, split: int) -> tuple[Dataset, Site]:
        """The data set of a split and the one site that the task is about."""
        dataset = load(self.data, size=self.size, seed=split, **self.options)
        if self.keep is not None:
            dataset = keep_classes(dataset, self.keep)
        sites = {site.name: site for site in (*dataset.sites, *dataset.unseen)}
        return dataset, sites[self.site or next(iter(sites))]

    def draw(self, shots: int, split: int) -> tuple[Split, Split, tuple[str, ...]]:
        """k labelled images, the test images, and the names of the classes. Fewer shots are the first of more shots."""
        if not 1 <= shots <= MOST_SHOTS:
            raise FedloraError(f"shots is a number from 1 to {MOST_SHOTS}, got {shots}")
        dataset, site = self.load(split)
        rng = seeded(f"few-shot {self.data} {self.site} {split}")
        order = torch.randperm(len(site.train), generator=rng).tolist()
        owners = self.group(site) if self.group else [str(i) for i in range(len(site.train))]
        first = {owner: i for owner, i in reversed([(owners[i], i) for i in order])}  # a person's first image
        rows = sorted(first.values(), key=order.index)[:shots]
        tested = torch.randperm(len(site.test), generator=rng)[: self.test].tolist()
        few, many = self._part(site.train, rows), self._part(site.test, tested)
        return few, many, ("background", self.data) if self.whole else dataset.classes

    def _part(self, split: Split, rows: list[int]) -> Split:
        images, masks = split.images[rows], split.masks[rows]
        masks = (masks > 0).to(torch.uint8) if self.whole else masks
        return Split(images if self.scale is None else self.scale(images), masks)


def _phantom(organ: str, appearance: float, tune: str, summary: str) -> Task:
    options = {"n_sites": 1, "n_unseen": 0, "per_site": MOST_SHOTS, "val": 1, "appearance": appearance}
    return Task(summary, "phantom", options, keep=organ, tune=tune)


def _nuclei(domain: str, tune: str = "nuclei-brightfield") -> Task:
    return Task(f"nuclei in {domain} images (real)", "nuclei", site=domain, tune=tune)


_HIPPOCAMPUS: dict[str, Any] = dict(
    data="hippocampus",
    model="meshnet",
    base="meshnet-brain",
    size=24,
    test=24,
    group=_people,
    scale=quantile_scale,
)

TASKS: dict[str, Task] = {
    "vessel": _phantom("vessel", 0.0, "kidneys-shifted", "a thin organ that pre-training ignored (phantom)"),
    "vessel-shifted": _phantom("vessel", 1.0, "kidneys-shifted", "the same under another appearance (phantom)"),
    "kidneys-shifted": _phantom("kidneys", 1.0, "", "a known organ under another appearance (phantom): for tuning"),
    "nuclei-fluo256": _nuclei("fluo256"),
    "nuclei-he": _nuclei("he"),
    "nuclei-fluo360": _nuclei("fluo360"),
    "nuclei-fluo520": _nuclei("fluo520"),
    "nuclei-brightfield": _nuclei("brightfield", ""),
    "hippocampus": Task("anterior and posterior hippocampus, 3D (real)", tune="hippocampus-whole", **_HIPPOCAMPUS),
    "hippocampus-whole": Task("the hippocampus as one structure, 3D: for tuning", whole=True, **_HIPPOCAMPUS),
}


def task(name: str) -> Task:
    """The row of that name."""
    if name not in TASKS:
        raise unknown("few-shot task", name, TASKS)
    return TASKS[name]
