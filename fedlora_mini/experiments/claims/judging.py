"""The verdict that stored runs give a claim: an interval over paired seeds and sites, its p-value, one word."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.experiments.arms import arm_of
from fedlora_mini.experiments.claims.claim import Claim
from fedlora_mini.experiments.claims.table import CLAIMS
from fedlora_mini.experiments.fewshot import report as fewshot
from fedlora_mini.experiments.report import Result, arms, metric_of, privacy, read_results, table_of
from fedlora_mini.experiments.stats import LEAST_PAIRS, Difference, holm, paired_difference

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the stored runs say about one claim."""

    claim: Claim
    difference: Difference | None
    p: float | None  # Holm-corrected over its part's claims that have results
    word: str  # supported, contradicted, not supported, inconclusive, not run

    def _repr_markdown_(self) -> str:
        claim, d = self.claim, self.difference
        compared = " − ".join(claim.title(arm) for arm in (claim.a, claim.b) if arm)
        expected = {1: "positive", -1: "negative", 0: f"within ±{claim.margin:g}"}[claim.sign]
        lines = [
            f"**Claim.** {claim.text}",
            "",
            "| | |",
            "|---|---|",
            f"| verdict | **{self.word}** |",
            f"| expected | {compared}, {claim.measured}: {expected} |",
        ]
        if d is not None:
            p = f", p = {self.p:.3f} (Holm)" if self.p is not None else ""
            lines.append(f"| measured | {d.mean:+.4f}, 95 % interval [{d.low:+.4f}, {d.high:+.4f}]{p} |")
            what, where = ("splits", "task") if claim.shots else ("seeds", "site")
            lines.append(f"| paired over | {d.seeds} {what} × {d.sites} {where}{'s' if d.sites > 1 else ''} |")
        lines += [f"| privacy | {line} |" for line in _budgets(claim)]
        lines += [
            *([f"| registered | {registered} |"] if (registered := _registered(claim)) else []),
            f"| matched | {claim.matched} |",
            f"| not matched | {claim.not_matched} |",
            f"| runs | {', '.join(f'`results/{file}`' for file in claim.files)} |",
        ]
        return "\n".join(lines)


def _registered(claim: Claim) -> str:
    """When, where it was not simply before its runs."""
    if claim.seen:
        return "after its runs, or a part of them, had been seen"
    return "before its first runs, which were made again since by another protocol" if claim.again else ""


def _budgets(claim: Claim) -> list[str]:
    """What the epsilon of the claim's private arms depends on: one line for all, or one for each arm."""
    folder = results_folder()
    if folder is None or claim.shots or not all((folder / file).is_file() for file in claim.files):
        return []
    told = {}
    for arm, file in claim.parts(claim.a) + claim.parts(claim.b):
        stored = _stored(folder, f"{file}.jsonl")
        of = privacy([r for r in stored if arm_of(r["config"]) == arm])
        told[claim.title(f"{arm}@{file}")] = ", ".join(f"{name}: {value}" for name, value in of.items())
    lines = set(told.values()) - {""}
    return sorted(lines) if len(lines) < 2 else [f"{arm}: {line}" for arm, line in told.items()]


def results_folder() -> Path | None:
    """The repository's `results/`: $FEDLORA_RESULTS, or above the working folder, or beside the package's sources."""
    named = os.environ.get("FEDLORA_RESULTS")
    places = [Path(named)] if named else [p / "results" for p in (Path.cwd(), *Path.cwd().parents)]
    places.append(Path(__file__).parents[3] / "results")
    return next((p for p in places if p.is_dir()), None)


def _stored(folder: Path, file: str) -> list[Result]:
    """A file's results, read once as long as it is not written again."""
    return _read(folder / file, (folder / file).stat().st_mtime_ns)


@lru_cache(maxsize=128)
def _read(path: Path, written: int) -> list[Result]:
    return read_results([path])


def _difference(claim: Claim) -> Difference | None:
    folder = results_folder()
    if folder is None or not all((folder / file).is_file() for file in claim.files):
        return None
    return _measured(claim, folder, tuple((folder / file).stat().st_mtime_ns for file in claim.files))


@lru_cache(maxsize=256)
def _measured(claim: Claim, folder: Path, written: tuple[int, ...]) -> Difference | None:
    """Computed once for files that were last `written` then; None while a file lacks one of the arms."""

    if not claim.shots and any(
        arm not in arms(_stored(folder, f"{file}.jsonl")) for arm, file in claim.parts(claim.a) + claim.parts(claim.b)
    ):
        return None

    def read(text: str) -> NDArray[np.float64]:
        if claim.shots:
            return fewshot.table_of(_stored(folder, claim.results), text, claim.shots, claim.metric)
        tables = []
        for arm, file in claim.parts(text):
            stored = _stored(folder, f"{file}.jsonl")
            own = table_of(stored, arm, claim.protocol, metric_of(stored) if claim.apart else claim.metric)
            tables.append(own.mean(1, keepdims=True) if claim.apart else own)
        if len({table.shape for table in tables}) > 1:
            raise FedloraError(f"'{text}' has not the same seeds and sites in every term")
        return tables[0] - sum(tables[1:])

    a = read(claim.a)
    b = read(claim.b) if claim.b else np.zeros_like(a)
    if not a.size or a.shape != b.shape:
        raise FedloraError(f"{', '.join(claim.files)} do not hold both {claim.a} and {claim.b} with the same seeds")
    return paired_difference(a, b)


def judge(claim: Claim, d: Difference, p: float) -> str:
    """No effect if the interval fits within the margin; else an effect if its corrected p is below 0.05.

    Against a claim of no effect p is not enough: the whole interval lies beyond the margin, or it may still be true.
    Fewer than LEAST_PAIRS seeds decide nothing: resampled, three numbers of one sign never cross zero.
    """
    if d.seeds < LEAST_PAIRS:
        return "inconclusive"
    none = -claim.margin < d.low and d.high < claim.margin
    if none:
        return "supported" if claim.sign == 0 else "not supported"
    beyond = d.low > claim.margin or d.high < -claim.margin
    if p >= LEVEL or (claim.sign == 0 and not beyond):
        return "inconclusive"
    return "supported" if d.mean * claim.sign > 0 else "contradicted"


def verdicts(claims: dict[str, Claim] | None = None) -> dict[str, Verdict]:
    """All verdicts. The p-values of one part of the book are corrected together, so that no later part moves them."""
    table = CLAIMS if claims is None else claims
    found = {key: _difference(claim) for key, claim in table.items()}
    tested = {key: d for key, d in found.items() if d is not None}
    corrected: dict[str, float] = {}
    for part in {table[key].part for key in tested}:
        own = [key for key in tested if table[key].part == part]
        corrected |= zip(own, holm([tested[key].p_bootstrap for key in own]), strict=True)
    return {
        key: Verdict(claim, d, corrected[key], judge(claim, d, corrected[key]))
        if (d := found[key]) is not None
        else Verdict(claim, None, None, "not run")
        for key, claim in table.items()
    }


def verdict(key: str) -> Verdict:
    """The card of one claim; a notebook shows it as a table."""
    if key not in CLAIMS:
        raise unknown("claim", key, CLAIMS)
    return verdicts()[key]
