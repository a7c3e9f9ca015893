"""Several methods, several seeds, one matched budget: run them all, keep one line a run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora_mini.data import Dataset
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import parse_arm
from fedlora_mini.experiments.checkpoint import write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import METRICS, dataset_of
from fedlora_mini.experiments.run import run

SEARCH_SEED = 1000  # the search for a learning rate sees other splits and other batches than any reported seed


def parse_seeds(text: str) -> list[int]:
    """ "0-2,7" -> [0, 1, 2, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise FedloraError(f"seeds '{text}' are not understood; accepted: numbers and ranges like 0-7 or 0,3,5-6")
        seeds += range(int(low), int(high or low) + 1)
    if not seeds or len(set(seeds)) != len(seeds):
        raise FedloraError(f"seeds '{text}' must be at least one number, none twice")
    return seeds


def validation(record: dict[str, Any]) -> float:
    """A finished run's score on validation data: Dice, or accuracy."""
    return next(record[f"val_{metric}"] for metric in METRICS.values() if f"val_{metric}" in record)


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
    rates: Sequence[float] = ()  # a grid: every method searches it on validation data of SEARCH_SEED
    on_run: Callable[[RunConfig], Callable[[dict[str, Any]], None]] = lambda config: lambda record: None
    search_seeds: Sequence[int] = (SEARCH_SEED,)
    widen: int = 0  # how often a search whose best rate is the last of the grid goes on by a factor of 2 on that side
    searched: list[dict[str, Any]] = field(default_factory=list)  # the search's runs, once it is over
    _data: tuple[int, Dataset] | None = None

    def run(self) -> list[dict[str, Any]]:
        """All results, methods within seeds; also written to `results.jsonl`."""
        if len(set(self.methods)) != len(self.methods):
            raise FedloraError(f"a method is named twice: {', '.join(self.methods)}")
        common = self.settings.get("change", {})
        parsed = [parse_arm(text) for text in self.methods]
        arms = [RunConfig(**self.settings | {"method": name, "change": common | own}) for name, own in parsed]
        if self.rates:
            arms = [self._search(config) for config in arms]
        results = [self._one(config.but(seed=seed)) for seed in self.seeds for config in arms]
        write_atomically(self.folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
        return results

    def _search(self, config: RunConfig) -> RunConfig:
        """The rate with the best personal validation score; ties go to the smaller one."""
        tried = {rate: self._tried(config.but(lr=rate)) for rate in sorted(self.rates)}
        for _ in range(self.widen if len(tried) > 1 else 0):
            best = max(sorted(tried), key=lambda rate: tried[rate])
            if min(tried) < best < max(tried):
                break
            further = best * 2 if best == max(tried) else best / 2
            tried[further] = self._tried(config.but(lr=further))
        return config.but(lr=max(sorted(tried), key=lambda rate: tried[rate]))

    def _tried(self, config: RunConfig) -> float:
        """Its mean validation score over the search's seeds."""
        records = [self._one(config.but(seed=seed)) for seed in self.search_seeds]
        self.searched += records
        return sum(map(validation, records)) / len(records)

    def _one(self, config: RunConfig) -> dict[str, Any]:
        folder = self.folder / f"{config.method}-seed{config.seed}-{config.key()}"
        return run(config, folder, self.on_run(config), lambda: self._dataset(config))

    def _dataset(self, config: RunConfig) -> Dataset:
        """The arms of one seed share their data."""
        if self._data is None or self._data[0] != config.seed:
            self._data = config.seed, dataset_of(config)
        return self._data[1]
