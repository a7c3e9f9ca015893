"""The study of private adaptation: who moves which factor when, with which filter, at one epsilon.

Ten classes of digits at eight clients, a small ViT whose base has seen none of their images, plain SGD; MNIST likewise,
and masks on the phantom. A part is a set of arms under common settings; every arm searches the same rates, by the same
rule, on seeds that are not reported. Chapter 17.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedlora_mini.errors import unknown
from fedlora_mini.experiments.arms import arm_of, title_of
from fedlora_mini.experiments.compare import SEARCH_SEED, Comparison, search_seeds, validation
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import METRICS
from fedlora_mini.experiments.lines import add_lines
from fedlora_mini.experiments.report import Result, arms, privacy, table_of

STEPS = 4  # K: even, so that alternating by step moves both factors equally often
COMMON: dict[str, Any] = {
    "data": "digits",
    "size": 12,
    "model": "vit",
    "rank": 2,
    "dirichlet": 0.1,
    "clients": 8,
    "rounds": 10,
    "steps": STEPS,
    "batch": 16,
    "optimiser": "sgd",
    "augment": False,
    "epsilon": 3.0,
    "data_options": {"test_seed": 0},  # the same test images at every seed: no search meets one of them
    "delta": 1e-5,
    "clip": 1.0,
    "threads": 1,
}
RATES = (0.1, 0.3, 0.6, 1.2, 3.0)
WIDEN = 4  # further rates, one after another, for an arm whose best is the last of the grid
SEARCH_SEEDS = (SEARCH_SEED, SEARCH_SEED + 1)  # of one alone the noise often chose the rate
FILTERED = ("none", "low-pass", "permuted", "rescaled")
AS = "as_lora:warmup=2"
COIN = "as_lora:choice=coin,warmup=2"  # AS-LoRA without its score
FIXED = ("fedit", "ffa", "rolora", "la_lora")
PLAIN = (*FIXED, AS)


def filtered(arm: str, kinds: Sequence[str] = FILTERED) -> list[str]:
    """The arm as it is, and with each filter."""
    joined = f"{arm}," if ":" in arm else f"{arm}:"
    return [arm if kind == "none" else _sorted(f"{joined}filter={kind}") for kind in kinds]


def _sorted(arm: str) -> str:
    """The arm as stored runs are named: changes in the order of their names."""
    name, _, told = arm.partition(":")
    return f"{name}:{','.join(sorted(told.split(',')))}"


@dataclass(frozen=True)
class Part:
    """Arms and what is set differently for all of them."""

    summary: str
    arms: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    times: int = 1  # as many seeds as the other parts, where a run is cheap and an equality is to be shown


MAIN = (
    *(arm for name in ("fedit", "la_lora", "rolora", "ffa") for arm in filtered(name)),
    "fedit:filter=doppler",
    "la_lora:first=A",
    "la_lora_pre",
    AS,
)
REST = (*(arm for name in ("la_lora:first=A", AS) for arm in filtered(name, FILTERED[1:])), COIN)
CELLS: dict[str, dict[str, float]] = {  # beside the one of `main`: Dirichlet 0.1, epsilon 3
    f"{dealt}{'_' * bool(dealt and budget)}{budget}": {"dirichlet": alpha, "epsilon": epsilon}
    for dealt, alpha in (("", 0.1), ("d03", 0.3), ("d05", 0.5))
    for budget, epsilon in (("", 3.0), ("e1", 1.0), ("e8", 8.0))
    if dealt or budget
}


def _by_arm(name: str, where: str, told: dict[str, Any]) -> dict[str, Part]:
    """What `main`, `half` and `rest` are, elsewhere."""
    return {
        name: Part(f"{where}: the arms of main", MAIN, told),
        f"{name}_half": Part(f"{where}: K/2 steps", tuple(filtered("fedit")), {**told, "steps": STEPS // 2}),
        f"{name}_rest": Part(f"{where}: the filters on A first and AS-LoRA, and its coin", REST, told),
    }


def _in_cells(prefix: str, where: str, told: dict[str, Any]) -> dict[str, Part]:
    """What `main`, `half` and `rest` are, in the other cells of epsilon and Dirichlet."""
    parts: dict[str, Part] = {}
    for cell, own in CELLS.items():
        here = f"{where}Dirichlet {own['dirichlet']:g}, epsilon {own['epsilon']:g}"
        parts |= _by_arm(prefix + cell, here, told | own)
    return parts


def _schedules_in_cells(prefix: str, where: str, told: dict[str, Any]) -> dict[str, Part]:
    """The schedules, two of them also with the low-pass filter, and K/2 steps, in those cells."""
    parts: dict[str, Part] = {}
    for cell, own in CELLS.items():
        here = f"{where}Dirichlet {own['dirichlet']:g}, epsilon {own['epsilon']:g}"
        parts[prefix + cell] = Part(here, SCHEDULES, told | own)
        parts[f"{prefix}{cell}_half"] = Part(f"{here}: K/2 steps", ("fedit",), told | own | {"steps": STEPS // 2})
    return parts


def _references_at(prefix: str, where: str, told: dict[str, Any]) -> dict[str, Part]:
    """What `open` and `untrained` are at the other mixtures of labels; a reference has no epsilon."""
    parts: dict[str, Part] = {}
    for dealt, alpha in (("d03", 0.3), ("d05", 0.5)):
        here, own = f"{where}Dirichlet {alpha:g}", told | {"dirichlet": alpha}
        parts[f"{prefix}open_{dealt}"] = Part(f"{here}: the arms without privacy", FIXED, own | OPEN)
        parts[f"{prefix}untrained_{dealt}"] = Part(
            f"{here}: the base under a new head", ("fedit",), own | UNTRAINED, ()
        )
    return parts


def _at_equal_bytes(prefix: str, where: str, told: dict[str, Any], rounds: dict[int, Sequence[str]]) -> dict[str, Part]:
    """The arms that send one factor in a round, for as many rounds as send what DP-LoRA and LA-LoRA send."""
    return {
        f"{prefix}bytes_{n}": Part(f"{where}as many bytes as LA-LoRA, {n} rounds", tuple(arms), told | {"rounds": n})
        for n, arms in rounds.items()
    }


def _with_references(name: str, where: str, told: dict[str, Any]) -> dict[str, Part]:
    """The same on other data, and what `open`, `clipped` and `untrained` are there."""
    return _by_arm(name, where, told) | {
        f"{name}_open": Part(f"{where}: without privacy", FIXED, told | OPEN),
        f"{name}_clipped": Part(f"{where}: clipped, without noise", ("fedit",), told | CLIPPED),
        f"{name}_untrained": Part(f"{where}: the base under a new head", ("fedit",), told | UNTRAINED, ()),
    }


SCHEDULES = (*PLAIN, "la_lora:first=A", *filtered("fedit", FILTERED[1:2]), *filtered("la_lora", FILTERED[1:2]))
NO_BUDGET = {"epsilon": None, "sigma": 200.0}
OPEN = {"epsilon": None, "execution": "grouped"}
CLIPPED = {"epsilon": None, "sigma": 0.0}  # all of the mechanism but its noise
UNTRAINED = {"epsilon": None, "rounds": 0}
RAW = {"epsilon": None, "sigma": 1.4858}  # the noise of `main`; there is no epsilon
MNIST: dict[str, Any] = {"data": "mnist"}
LONG = {"rounds": 20, "batch": 32}
# MiniSAM at rank 1 trains 3.7 k numbers; eight sites with an appearance each, whose images are not dealt.
PHANTOM: dict[str, Any] = {"data": "phantom", "model": "minisam", "rank": 1, "size": 24, "batch": 8, "rounds": 6}
PHANTOM |= {"dirichlet": None, "clients": None, "data_options": {"n_sites": 8, "per_site": 64, "val": 8, "test": 16}}
NUCLEI: dict[str, Any] = PHANTOM | {"data": "nuclei", "size": 32, "batch": 16}
NUCLEI |= {"dirichlet": 0.1, "clients": 8}  # four domains, dealt by domain
NUCLEI |= {"data_options": {"per_site": 200, "val": 40, "test_seed": 0}}
PARTS: dict[str, Part] = {
    "main": Part("Dirichlet 0.1, epsilon 3: every arm that moves K steps a round, by filter", MAIN),
    "half": Part(
        "the same with K/2 steps and the noise that so few need", tuple(filtered("fedit")), {"steps": STEPS // 2}
    ),
    "rest": Part("the filters on the other arms of main", (*REST, *filtered("la_lora_pre", FILTERED[1:]))),
    "open": Part("the same without privacy", FIXED, OPEN),
    "clipped": Part("the same clipped, without noise", ("fedit",), CLIPPED),
    "untrained": Part("the base under a new head", ("fedit",), UNTRAINED, ()),
    "curvature": Part("the same, AS-LoRA scored without a curvature", ("as_lora:curvature=none,warmup=2",)),
    "not_dp": Part("the same noise, AS-LoRA with the published curvature", ("as_lora:curvature=raw,warmup=2",), RAW),
    **_at_equal_bytes("", "", {}, {15: ("ffa", AS), 16: ("rolora",)}),
    "noise": Part("noise alone: its energy in BA", SCHEDULES, {**NO_BUDGET, "lr": 0.01}, (), 4),
    "noise_half": Part("the same with K/2 steps", ("fedit",), {**NO_BUDGET, "lr": 0.01, "steps": STEPS // 2}, (), 4),
    **_in_cells("", "", {}),
    **_references_at("", "", {}),
    **_references_at("mnist_", "MNIST, ", MNIST),
    **_with_references("mnist", "MNIST", MNIST),
    **_in_cells("mnist_", "MNIST, ", MNIST),
    **_at_equal_bytes("mnist_", "MNIST, ", MNIST, {15: ("ffa", AS), 16: ("rolora",)}),
    "mnist_long": Part("MNIST, twice the rounds and the expected batch", PLAIN, MNIST | LONG),
    "mnist_long_open": Part("the same without privacy", ("fedit", "la_lora"), MNIST | LONG | OPEN),
    **_with_references("phantom", "masks, the phantom at eight sites", PHANTOM),
    **_at_equal_bytes("phantom_", "masks, the phantom, ", PHANTOM, {10: (AS,), 12: ("rolora",), 14: ("ffa",)}),
    **_by_arm("phantom_e1", "masks, the phantom, epsilon 1", PHANTOM | {"epsilon": 1.0}),
    **_by_arm("phantom_e8", "masks, the phantom, epsilon 8", PHANTOM | {"epsilon": 8.0}),
    **_with_references("nuclei", "masks, nuclei of four domains dealt to eight clients", NUCLEI),
    **_schedules_in_cells("nuclei_", "masks, nuclei, ", NUCLEI),
    **_references_at("nuclei_", "masks, nuclei, ", NUCLEI),
}


@dataclass
class PrivateStudy:
    """Parts one after another under `folder`; an interrupted study goes on where it stopped."""

    parts: Sequence[str]
    seeds: Sequence[int]
    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)  # other settings for all parts
    rates: Sequence[float] | None = None  # in the place of the parts' own
    on_run: Callable[[RunConfig], Callable[[dict[str, Any]], None]] = lambda config: lambda record: None
    searched: list[Result] = field(default_factory=list)  # the search's runs, once it is over

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise unknown("part of the private study", name, PARTS)

    def run(self) -> dict[str, list[Result]]:
        """Part -> its results, also in `private_<part>.jsonl`; the searches of all parts in `private_rates.jsonl`.

        What these files hold of other runs stays in them. Raises before anything trains for an arm that cannot run.
        """
        out: dict[str, list[Result]] = {}
        self.searched.clear()
        studies = {name: self._study(name) for name in self.parts}
        for study in studies.values():
            study.check()
        for name, study in studies.items():
            out[name] = study.run()
            self.searched += study.searched
            add_lines(self.folder / f"private_{name}.jsonl", out[name])
            add_lines(self.folder / "private_rates.jsonl", [search_record(r) for r in study.searched])
        return out

    def _study(self, name: str) -> Comparison:
        part = PARTS[name]
        rates = part.rates if self.rates is None or not part.rates else self.rates
        settings = COMMON | part.settings | self.changes
        apart = max(self.seeds) - min(self.seeds) + 1
        seeds = [seed + apart * i for i in range(part.times) for seed in self.seeds]
        # other seeds' validation images, where none is a test image of a reported seed; else each seed's own
        others = SEARCH_SEEDS if search_seeds(RunConfig(**settings)) else ()
        return Comparison(part.arms, seeds, settings, self.folder / name, rates, self.on_run, others, WIDEN)


def search_record(result: Result) -> Result:
    """What chose a rate and what made it; scores on test images have no part in a search."""
    kept = ("event", "config", "versions", "machine", "val_accuracy", "val_dice", "privacy", "seconds", "final_sha256")
    return {name: result[name] for name in kept if name in result}


def table(results: Sequence[Result]) -> pd.DataFrame:
    """One row an arm: the score of the common model, mean and deviation over seeds, and what epsilon depends on."""
    rows = {}
    for arm in arms(results):
        mine = [r for r in results if arm_of(r["config"]) == arm]
        metric = METRICS["classification" if "val_accuracy" in mine[0] else "segmentation"]
        own = table_of(results, arm, "global", metric).mean(1)
        spread = f" ± {own.std(ddof=1):.3f}" if len(own) > 1 else ""
        rates = ", ".join(sorted({f"{r['config']['lr']:g}" for r in mine}))
        rows[title_of(arm)] = {metric: f"{own.mean():.3f}{spread}", "seeds": len(own), "rate": rates} | privacy(mine)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="arm")


class Searched(NamedTuple):
    """What a rate was searched for."""

    arm: str
    epsilon: float | None
    dirichlet: float | None
    steps: int
    data: str
    rounds: int
    sigma: float | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Searched":
        return cls(arm_of(config), *(config[name] for name in cls._fields[1:]))


def curves(searched: Sequence[Result]) -> dict[Searched, dict[float, float]]:
    """For each of them: rate -> mean validation score over the search's seeds."""
    told: dict[Searched, dict[float, list[float]]] = {}
    for r in searched:
        told.setdefault(Searched.of(r["config"]), {}).setdefault(r["config"]["lr"], []).append(validation(r))
    return {k: {lr: sum(v) / len(v) for lr, v in sorted(by.items())} for k, by in told.items()}


def edges(searched: Sequence[Result]) -> list[str]:
    """The arms whose best rate is the smallest or the largest that was tried, in words."""
    found = []
    for own, curve in curves(searched).items():
        best = max(curve, key=lambda rate: curve[rate])
        if best in (min(curve), max(curve)) and len(curve) > 1:
            told = f"{own.arm} on {own.data}, epsilon {own.epsilon}, Dirichlet {own.dirichlet}"
            told += f", {own.rounds} × {own.steps} steps"
            found.append(f"{told}: best rate {best:g} is an edge")
    return found
