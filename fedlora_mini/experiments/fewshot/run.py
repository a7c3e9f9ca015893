"""One adaptation from k images, and a study of many: no validation data, stopped by the training loss."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.accepted import ranges
from fedlora_mini.adapters import adapters, keys, prepare, trainable
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.fewshot.arms import arm
from fedlora_mini.experiments.fewshot.tasks import task
from fedlora_mini.experiments.lines import add_lines, read_lines, write_lines
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sampling import batch_indices, flips, generator
from fedlora_mini.federation.sharing import everything
from fedlora_mini.metrics import evaluate
from fedlora_mini.metrics.rank import effective_rank, pairs, ranks, singular_values
from fedlora_mini.models import load_base
from fedlora_mini.state import State

SEARCH_SPLITS = (1000, 1001, 1002)  # splits of the tuning task: other images than any reported split
SEARCH_SHOTS = 5
LOGS = ("runs.jsonl", "search.jsonl")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class FewshotConfig:
    """One run. `changes` are options of the arm's regularisers, such as {"lam": 0.01}."""

    task: str = "vessel"
    arm: str = "lora-4"
    shots: int = 5
    split: int = 0
    lr: float = 5e-3
    steps: int = 120  # at most
    batch: int = 4
    patience: int = 40  # training ends once the loss, a mean over half as many steps, stands still for so many
    threads: int = 1
    changes: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        ranges(self, steps="[1, inf)", batch="[1, inf)", patience="[2, inf)", threads="[1, inf)", lr="(0, inf)")

    def key(self) -> str:
        """Twelve hexadecimal digits that change with anything that can change the result."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Plateau:
    """True once the mean of the last `window` losses has fallen by less than `least` within `patience` steps."""

    def __init__(self, window: int = 20, patience: int = 40, least: float = 1e-3) -> None:
        self.window, self.patience, self.least = window, patience, least
        self.losses: list[float] = []

    def __call__(self, step: int, losses: list[float]) -> bool:
        self.losses.append(sum(losses))
        w, p = self.window, self.patience
        if len(self.losses) < w + p:
            return False
        now, then = sum(self.losses[-w:]) / w, sum(self.losses[-w - p : -p]) / w
        return then - now < self.least


@dataclass
class Adaptation:
    """The adapted network, for a notebook to look into: `state` is what was trained, `record` the line of results."""

    model: nn.Module
    start: State
    state: State
    test: Split
    classes: tuple[str, ...]
    record: dict[str, Any]


def adapt(config: FewshotConfig, device: str = "cpu") -> Adaptation:
    """Adapt the arm to k images of the task and score it on the task's test images."""
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)  # a MeshNet that fades out in training takes five times as long without
    row, what = arm(config.arm), task(config.task)
    few, many, classes = _drawn(config.task, config.shots, config.split)
    began = perf_counter()
    base = what.base if row.base == "auto" else row.base
    model = load_base(what.model, len(classes), tuple(few.images.shape[2:]), base, config.split)
    model = prepare(model, row.adapter, config.split, **row.options).to(device)
    start = trainable(model)
    method = Method(row.title, row.adapter, everything, objective=row.objective(**dict(config.changes)))
    budget = Budget(config.steps, min(config.batch, config.shots), config.lr, pace="cosine")
    rng = generator("few-shot batches", config.split, config.shots)
    index = batch_indices(len(few), budget.batch, budget.steps, rng)
    images, masks = few.images.to(device), few.masks.to(device)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows = index[step - 1].to(device)
        return flips(images[rows], masks[rows], rng)

    plateau = Plateau(config.patience // 2, config.patience)
    table = keys(model, list(start))
    (state,), _ = train(model, method, table, [start], batches, budget, 1, stop=plateau)
    if row.finish is not None:
        state = row.finish(model, state, few)
    seconds = perf_counter() - began
    scores = evaluate(model, state, many, classes)
    record = {
        "event": "result",
        "config": asdict(config),
        "versions": versions(),
        "machine": machine(torch.device(device)),
        "dice": scores.dice,
        "hd95": scores.hd95,
        "per_class": scores.per_class,
        "steps": len(plateau.losses),
        "loss": sum(plateau.losses[-20:]) / len(plateau.losses[-20:]),
        "trained": S.count(start),
        **_ranks(model, state),
        "seconds": seconds,
    }
    return Adaptation(model, start, state, many, classes, record)


@lru_cache(maxsize=4)
def _drawn(name: str, shots: int, split: int) -> tuple[Split, Split, tuple[str, ...]]:
    return task(name).draw(shots, split)


def _ranks(model: nn.Module, state: State) -> dict[str, Any]:
    """Rank by layer, its sum, a smooth count, the update's nuclear norm, and the numbers left after pruning.

    A run that diverged has no spectrum: it says so, and counts zeros.
    """
    if not S.finite(state):
        none = {"ranks": {}, "rank": 0, "effective_rank": 0.0, "nuclear": 0.0, "l1_v": 0.0}
        return {**none, "kept": S.count(state), "diverged": True}
    found = pairs(model, state)
    counts = ranks(model, state)
    spectra = [singular_values(P, Q) for P, Q in found.values()]
    kept = S.count(state)
    for path, adapter in adapters(model):
        if path in counts:
            A, B = found[path][1], found[path][0]
            each = A.shape[1] + B.shape[0] + ("v" in adapter.factors)
            kept -= (A.shape[0] - counts[path]) * each
    return {
        "ranks": counts,
        "rank": sum(counts.values()),
        "effective_rank": sum(map(effective_rank, spectra)),
        "nuclear": float(sum(s.sum() for s in spectra)),
        "l1_v": float(sum(v.abs().sum() for name, v in state.items() if name.endswith(".v"))),
        "kept": kept,
    }


@dataclass
class Study:
    """Arms x shots x splits of some tasks, each arm with its own rate from one grid; resumable, one line a run.

    The rate of an arm is the one with the best mean Dice on the task's tuning task, over `searched` at SEARCH_SHOTS.
    """

    tasks: Sequence[str]
    arms: Sequence[str]
    shots: Sequence[int]
    splits: Sequence[int]
    folder: Path
    rates: Sequence[float] = RATES
    settings: dict[str, Any] | None = None
    on_run: Callable[[dict[str, Any]], None] = lambda record: None
    searched: Sequence[int] = SEARCH_SPLITS

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)  # its name will do
        self._done: dict[str, dict[str, Any]] = {}
        for name in self.tasks:
            if not task(name).tune:
                raise FedloraError(f"'{name}' is a task for tuning: its scores choose learning rates")
        for rate in self.rates:
            FewshotConfig(lr=rate, **(self.settings or {}))  # raises for a bad number before anything runs
        for name in self.arms:
            arm(name).objective(**dict((self.settings or {}).get("changes", ())))

    def run(self) -> list[dict[str, Any]]:
        """All results, also in `results.jsonl`, beside the others that it holds.

        `runs.jsonl` and `search.jsonl` keep every run once it is done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for known in (path for path in map(self.folder.joinpath, LOGS) if path.exists()):
            lines = read_lines(known)
            write_lines(known, lines)  # without a line that was cut off
            self._done |= {_key_of(r): r for r in lines}
        out = []
        for name in self.tasks:
            for each in self.arms:
                lr = self.rate(task(name).tune, each)
                base = FewshotConfig(task=name, arm=each, lr=lr, **(self.settings or {}))
                for split in self.splits:
                    out += [self._one(replace(base, shots=k, split=split), "runs.jsonl") for k in self.shots]
        add_lines(self.folder / "results.jsonl", out)
        return out

    def rate(self, tune: str, name: str) -> float:
        """The arm's learning rate by the tuning task; ties go to the smaller one. One rate given is taken as it is."""
        if len(self.rates) == 1:
            return self.rates[0]
        base = FewshotConfig(task=tune, arm=name, shots=SEARCH_SHOTS, **(self.settings or {}))
        tried = {
            lr: sum(self._one(replace(base, lr=lr, split=s), "search.jsonl")["dice"] for s in self.searched)
            for lr in sorted(self.rates)
        }
        return max(tried, key=lambda lr: tried[lr])

    def _one(self, config: FewshotConfig, file: str) -> dict[str, Any]:
        path = self.folder / file
        if config.key() not in self._done:
            record = adapt(config).record
            with open(path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
            self._done[config.key()] = record
            self.on_run(record)
        return self._done[config.key()]


def _key_of(record: dict[str, Any]) -> str:
    own = record["config"]
    return FewshotConfig(**own | {"changes": tuple(map(tuple, own["changes"]))}).key()
