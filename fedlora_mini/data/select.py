"""Which sites train, which are held out, and how many images of each: the same words for every data set."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.errors import FedloraError, unknown

Choice = str | int | Sequence[str] | None


def counted(choice: Choice, pool: Collection[str] = ()) -> Choice:
    """A text of digits as the number that it is, unless it is the name of a site."""
    return int(choice) if isinstance(choice, str) and choice.isdecimal() and choice not in pool else choice


def choose_sites(dataset: Dataset, sites: Choice = None, unseen: Choice = None) -> Dataset:
    """The data set with these sites.

    A number means the first so many `sites`, or so many `unseen` ones (the data set's own first, then its last sites).
    Names: a list, or "a,b"; "3" is a site of that name where there is one, else a number. `unseen=()` holds nobody
    out. Sites that neither names are left out.
    """
    pool = {site.name: site for site in (*dataset.sites, *dataset.unseen)}
    sites, unseen = counted(sites, pool), counted(unseen, pool)
    usual, held = [s.name for s in dataset.sites], [s.name for s in dataset.unseen]
    wanted, kept_out = _names(sites, pool), _names(unseen, pool)
    if isinstance(unseen, int):
        candidates = [name for name in [*held, *reversed(usual)] if wanted is None or name not in wanted]
        kept_out = _first(candidates, unseen, "unseen sites", dataset.name)
    if kept_out is None:
        kept_out = [name for name in held if wanted is None or name not in wanted]
    if wanted is None:
        wanted = [name for name in usual if name not in kept_out]
        if isinstance(sites, int):
            wanted = _first(wanted, sites, "sites", dataset.name)
    both = [name for name in wanted if name in kept_out]
    if both:
        raise FedloraError(f"site '{both[0]}' cannot both train and be unseen")
    if not wanted:
        raise FedloraError(f"no site of '{dataset.name}' is left to train")
    return replace(dataset, sites=tuple(pool[n] for n in wanted), unseen=tuple(pool[n] for n in kept_out))


def limit(dataset: Dataset, per_site: int | None = None, val: int | None = None, test: int | None = None) -> Dataset:
    """At most so many images in each site's splits, evenly spaced over what is there: few-shot regimes, quick runs."""
    for name, value in {"per_site": per_site, "val": val, "test": test}.items():
        if value is not None and value < 1:
            raise FedloraError(f"{name} must be at least 1, got {value}")

    def cut(site: Site) -> Site:
        return replace(site, train=_thin(site.train, per_site), val=_thin(site.val, val), test=_thin(site.test, test))

    return replace(dataset, sites=tuple(map(cut, dataset.sites)), unseen=tuple(map(cut, dataset.unseen)))


def keep_classes(dataset: Dataset, keep: Sequence[str] | str, others: int = 0) -> Dataset:
    """Only these classes, numbered anew; other structures become `others` (0, or IGNORE: nobody is judged on them)."""
    names = [keep] if isinstance(keep, str) else list(keep)
    for name in names:
        if name not in dataset.classes[1:]:
            raise unknown("class", name, dataset.classes[1:])
    table = torch.arange(256, dtype=torch.uint8)
    table[1 : len(dataset.classes)] = others
    for number, name in enumerate(names, start=1):
        table[dataset.classes.index(name)] = number

    def relabel(site: Site) -> Site:
        train, val, test = (Split(s.images, table[s.masks.long()]) for s in (site.train, site.val, site.test))
        return replace(site, train=train, val=val, test=test)

    return replace(
        dataset,
        sites=tuple(map(relabel, dataset.sites)),
        unseen=tuple(map(relabel, dataset.unseen)),
        classes=("background", *names),
    )


def _thin(split: Split, most: int | None) -> Split:
    if most is None or len(split) <= most:
        return split
    rows = torch.from_numpy(np.linspace(0, len(split) - 1, most).round().astype(np.int64))
    return Split(split.images[rows], split.masks[rows])


def _names(choice: Choice, pool: dict[str, Site]) -> list[str] | None:
    if choice is None or isinstance(choice, int):
        return None
    names = [n.strip() for n in choice.split(",") if n.strip()] if isinstance(choice, str) else list(choice)
    for name in names:
        if name not in pool:
            raise unknown("site", name, pool)
    return list(dict.fromkeys(names))


def _first(names: list[str], count: int, what: str, dataset: str) -> list[str]:
    if not 0 <= count <= len(names):
        raise FedloraError(f"'{dataset}' has {len(names)} {what} to give, {count} were asked for")
    return names[:count]
