"""Stored few-shot runs as tables and pictures: Dice by arm and shots, what was kept, where the rank went."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.fewshot.arms import ARMS, EXTRA
from fedlora_mini.experiments.fewshot.arms import arm as row
from fedlora_mini.experiments.stats import interval
from fedlora_mini.picture import Picture

Result = dict[str, Any]


def of(results: Sequence[Result], arm: str, shots: int | None = None, tasks: Sequence[str] = ()) -> list[Result]:
    """The runs of some arms, by task and split: "lora-4|lora-8", "arena-*"; "arena-8@vessel" keeps only that task."""
    patterns, _, only = arm.partition("@")
    found = [
        r
        for r in results
        if any(fnmatch(r["config"]["arm"], pattern) for pattern in patterns.split("|"))
        and (shots is None or r["config"]["shots"] == shots)
        and (not only or r["config"]["task"] == only)
        and (not tasks or r["config"]["task"] in tasks)
    ]
    return sorted(found, key=lambda r: (r["config"]["task"], r["config"]["split"], r["config"]["arm"]))


def value(result: Result, metric: str) -> float:
    """A number of a run by name, a quotient "a / b" of two, or the logarithm "log …" of either."""
    top, over, bottom = metric.removeprefix("log ").partition(" / ")
    number = float(result[top]) / (float(result[bottom]) if over else 1.0)
    return float(np.log(number)) if metric.startswith("log ") else number


def table_of(results: Sequence[Result], arm: str, shots: int, metric: str = "dice") -> NDArray[np.float64]:
    """(splits, tasks) of one arm; "range of …" over all arms that match: the largest minus the smallest."""
    spread = metric.startswith("range of ")
    name = metric.removeprefix("range of ")
    cells: dict[tuple[int, str], list[float]] = {}
    for r in of(results, arm, shots):
        cells.setdefault((r["config"]["split"], r["config"]["task"]), []).append(value(r, name))
    splits, tasks = sorted({s for s, _ in cells}), sorted({t for _, t in cells})
    if len(cells) != len(splits) * len(tasks):
        raise FedloraError(f"arm '{arm}' at {shots} shots does not have every split on every task")
    out = np.array([[max(c) - min(c) if spread else c[0] for t in tasks if (c := cells[s, t])] for s in splits])
    return out.reshape(len(splits), len(tasks))


def summary(results: Sequence[Result], shots: int) -> pd.DataFrame:
    """One row an arm: mean Dice with a 95 % interval over splits and tasks, numbers trained and kept, rank, rate."""
    rows = []
    for arm in arms(results):
        own = of(results, arm, shots)
        if not own:
            continue
        dice = table_of(results, arm, shots)
        low, high = interval(dice)
        rate = sorted({r["config"]["lr"] for r in own})
        rows.append(
            {
                "arm": row(arm).title,
                "Dice": f"{dice.mean():.3f}",
                "95 % interval": f"[{low:.3f}, {high:.3f}]" if len(dice) > 1 else "–",
                "HD95": f"{np.mean([r['hd95'] for r in own]):.1f}",
                "trained": f"{own[0]['trained']:,}",
                "kept": f"{np.mean([r['kept'] for r in own]):,.0f}",
                "rank": f"{np.mean([r['rank'] for r in own]):.0f}" if own[0]["rank"] else "–",
                "lr": ", ".join(f"{lr:g}" for lr in rate),
                "steps": f"{np.mean([r['steps'] for r in own]):.0f}",
            }
        )
    return pd.DataFrame(rows)


def arms(results: Sequence[Result]) -> list[str]:
    """Arms that occur, in the order of the table."""
    present = {r["config"]["arm"] for r in results}
    return [name for name in ARMS | EXTRA if name in present]


def frontier(results: Sequence[Result], shots: int) -> Figure:
    """Dice against the numbers that are kept, one mark an arm, with its interval."""
    figure = Picture(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    for arm in arms(results):
        own = of(results, arm, shots)
        if not own:
            continue
        dice = table_of(results, arm, shots)
        low, high = interval(dice)
        kept, mean = np.mean([r["kept"] for r in own]), dice.mean()
        family = arm.rstrip("0123456789").rstrip("-")
        color, marker = {"lora": ("C0", "o"), "arena": ("C3", "D")}.get(family, ("0.35", "s"))
        axis.errorbar(kept, mean, [[mean - low], [high - mean]], color=color, marker=marker, ms=5, lw=1, capsize=2)
        axis.annotate(row(arm).title, (kept, mean), (4, 3), textcoords="offset points", fontsize=7, color=color)
    axis.set(xscale="log", xlabel="numbers kept after training", ylabel=f"Dice from {shots} images")
    axis.grid(alpha=0.3)
    return figure


def by_layer(results: Sequence[Result], arm: str, shots: int) -> pd.DataFrame:
    """Layers x tasks: mean rank that is left."""
    own = of(results, arm, shots)
    frame = pd.DataFrame([{"task": r["config"]["task"], **r["ranks"]} for r in own])
    return frame.groupby("task").mean().T


def write_report(results: Sequence[Result], folder: str | Path) -> tuple[Path, list[Path]]:
    """`report.md` with a table for every number of shots, and one picture each. Returns their paths."""
    folder = Path(folder)
    lines, pictures = ["# Few-shot adaptation", ""], []
    tasks = sorted({r["config"]["task"] for r in results})
    splits = len({r["config"]["split"] for r in results})
    lines += [f"Tasks: {', '.join(tasks)}; {splits} split{'s' if splits > 1 else ''}.", ""]
    for shots in sorted({r["config"]["shots"] for r in results}):
        frame = summary(results, shots)
        header = "| " + " | ".join(frame.columns) + " |"
        rule = "|" + "---|" * len(frame.columns)
        rows = ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
        lines += [f"## {shots} shot{'s' if shots > 1 else ''}", "", header, rule, *rows, ""]
        path = folder / f"frontier-{shots}.png"
        frontier(results, shots).savefig(path, dpi=130)
        pictures.append(path)
    text = folder / "report.md"
    text.write_text("\n".join(lines), encoding="utf-8")
    return text, pictures
