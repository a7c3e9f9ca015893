"""Several methods, several seeds, one matched budget: run them all, keep one line a run."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora_mini.data import DATASETS, Dataset
from fedlora_mini.errors import Diverged, FedloraError
from fedlora_mini.experiments.arms import arm_of, parse_arm
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import METRICS, Federation, dataset_of
from fedlora_mini.experiments.lines import add_lines, read_lines
from fedlora_mini.experiments.run import is_finished, run

SEARCH_SEED = 1000  # no reported seed: another start, other batches, and where images are simulated other images
MOST_SEEDS = 10_000
SEARCH_ON: dict[str, tuple[int, ...]] = {"own-split": (), "other-seed": (SEARCH_SEED,)}


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """ "0-2,7" -> [0, 1, 2, 7]; `what` they are, for an error."""
    seeds: list[int] = []
    for part in map(str.strip, text.split(",")):
        if not re.fullmatch(r"[0-9]{1,20}(-[0-9]{1,20})?", part):
            raise FedloraError(f"{what} '{text}' are not understood; accepted: numbers and ranges like 0-7 or 0,3,5-6")
        low, _, high = part.partition("-")
        own = range(int(low), int(high or low) + 1)
        if not own:
            raise FedloraError(f"{what} '{text}': '{part}' runs backwards; accepted: ranges like 0-7")
        if len(seeds) + own.stop - own.start > MOST_SEEDS:
            raise FedloraError(f"{what} '{text}' are too many; accepted: at most {MOST_SEEDS:,} numbers")
        seeds += own
    if len(set(seeds)) != len(seeds):
        raise FedloraError(f"{what} '{text}' must be at least one number, none twice")
    return seeds


def search_seeds(config: RunConfig) -> tuple[int, ...]:
    """Whose validation images choose a rate: SEARCH_SEED's where none is a test image, else () = each seed's own.

    On real images another seed is another split of the same images: some that choose the rate would be test images,
    unless the option `test_seed` holds these out at every seed. Simulated ones are drawn anew.
    """
    known = DATASETS.get(config.data)
    held = config.data_options.get("test_seed") is not None
    return SEARCH_ON["other-seed" if held or (known is not None and known.kind == "simulated") else "own-split"]


def validation(record: dict[str, Any]) -> float:
    """A finished run's score on validation data: Dice, or accuracy."""
    return next(record[f"val_{metric}"] for metric in METRICS.values() if f"val_{metric}" in record)


Found = tuple[RunConfig, dict[str, Any]]
"""A run with its rate, and what its record says of how that was found."""


@dataclass
class Comparison:
    """Runs under `folder`, one sub-folder each, so that an interrupted comparison goes on where it stopped.

    `methods` are arms as `parse_arm` reads them. `settings` are those of `RunConfig`, common to all; without an `lr`
    among them each adapter takes its own.
    """

    methods: Sequence[str]
    seeds: Sequence[int]
    settings: dict[str, Any]
    folder: Path
    rates: Sequence[float] = ()  # a grid: every method searches it on validation images
    on_run: Callable[[RunConfig], Callable[[dict[str, Any]], None]] = lambda config: lambda record: None
    search_seeds: Sequence[int] | None = None  # whose images; () = each seed's own; None = by `search_seeds`
    widen: int = 0  # how often a search whose best rate is the last of the grid goes on by a factor of 2 on that side
    searched: list[dict[str, Any]] = field(default_factory=list)  # the search's runs, once it is over
    _data: tuple[int, Dataset] | None = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)  # its name will do

    def run(self) -> list[dict[str, Any]]:
        """All results, methods within seeds; also written to `results.jsonl`, beside the other runs that it holds.

        A record with a searched rate says under "search" which seeds' images chose it, and what each rate scored there
        (None where it diverged). Raises before anything trains for an arm that cannot run.
        """
        arms, on = self.check()
        self.searched.clear()
        file = self.folder / "results.jsonl"
        if file.exists():
            read_lines(file)  # raises for a damaged one before anything runs
        found: list[Found] = [(config, {}) for config in arms]
        if self.rates and on:
            found = [self._search(config, on) for config in arms]
        results = []
        for seed in self.seeds:
            if self.rates and not on:
                found = [self._search(config, (seed,)) for config in arms]
            for config, told in found:
                results.append(self._one(config.but(seed=seed)) | told)
                add_lines(file, results[-1:])  # what is finished is kept, whatever comes of the next
        return results

    def check(self) -> tuple[list[RunConfig], Sequence[int]]:
        """The arms, and the seeds on which their rates are searched; raises for an arm that cannot run."""
        for what, given in {"methods": self.methods, "seeds": self.seeds}.items():
            if not given:
                raise FedloraError(f"nothing to compare: {what} is empty")
        common = self.settings.get("change", {})
        parsed = [parse_arm(text) for text in self.methods]
        arms = [RunConfig(**self.settings | {"method": name, "change": common | own}) for name, own in parsed]
        if len({config.key() for config in arms}) != len(arms):
            raise FedloraError(f"a method is named twice: {', '.join(self.methods)}")
        on = search_seeds(arms[0]) if self.search_seeds is None else self.search_seeds
        start = {"lr": min(self.rates), "leakage": False} if self.rates else {}
        for config in arms:
            first = config.but(seed=(*on, *self.seeds)[0] if self.rates else self.seeds[0], **start)
            if not (self._folder(first) / "result.json").exists():  # else it could
                Federation.build(first, self._dataset(first))
        return arms, on

    def _search(self, config: RunConfig, seeds: Sequence[int]) -> Found:
        """The rate with the best personal validation score on these seeds; ties go to the smaller one.

        Neither leakage nor a test image is looked at.
        """
        blind = config.but(leakage=False)
        tried = {rate: self._tried(blind.but(lr=rate), seeds) for rate in sorted(self.rates)}
        for _ in range(self.widen if len(tried) > 1 else 0):
            best = max(sorted(tried), key=lambda rate: tried[rate])
            if min(tried) < best < max(tried):
                break
            further = best * 2 if best == max(tried) else best / 2
            tried[further] = self._tried(blind.but(lr=further), seeds)
        if max(tried.values()) == -math.inf:
            every = ", ".join(f"{rate:g}" for rate in sorted(tried))
            raise FedloraError(f"'{config.method}' diverges at every rate that was tried: {every}")
        if any(map(math.isnan, tried.values())):
            why = "a site's validation masks have no foreground, so rates have no score to be chosen by"
            raise FedloraError(f"'{config.method}': {why}; deal more validation images, or name a rate")
        scores = {f"{rate:g}": score if score > -math.inf else None for rate, score in sorted(tried.items())}
        told = {"seeds": list(seeds), "tried": scores}
        return config.but(lr=max(sorted(tried), key=lambda rate: tried[rate])), {"search": told}

    def _tried(self, config: RunConfig, seeds: Sequence[int]) -> float:
        """Its mean validation score over these seeds; -inf where training leaves the finite numbers."""
        try:
            records = [self._one(config.but(seed=seed), test=False) for seed in seeds]
        except Diverged:
            return -math.inf
        self.searched += records
        return sum(map(validation, records)) / len(records)

    def _one(self, config: RunConfig, test: bool = True) -> dict[str, Any]:
        folder = self._folder(config)
        known = config.data in DATASETS and is_finished(folder, test)  # then its images are not looked at
        try:
            return run(config, folder, self.on_run(config), None if known else lambda: self._dataset(config), test)
        except FedloraError as error:
            kind = Diverged if isinstance(error, Diverged) else FedloraError
            raise kind(f"{arm_of(config.asdict())}, seed {config.seed}: {error}") from None

    def _folder(self, config: RunConfig) -> Path:
        return self.folder / f"{config.method}-seed{config.seed}-{config.key()}"

    def _dataset(self, config: RunConfig) -> Dataset:
        """The arms of one seed share their data."""
        if self._data is None or self._data[0] != config.seed:
            self._data = config.seed, dataset_of(config)
        return self._data[1]
