"""Results as a table and a figure that a person can read."""

import json
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import arm_of, title_of
from fedlora_mini.experiments.lines import parsed
from fedlora_mini.experiments.stats import Difference, holm, paired_difference
from fedlora_mini.experiments.together import check, matched, told_apart
from fedlora_mini.federation import METHODS
from fedlora_mini.picture import Picture

Result = dict[str, Any]


def read_results(paths: Sequence[str | Path]) -> list[Result]:
    """Results from run folders, comparison folders or `.jsonl` files, each run once."""
    found: dict[str, Result] = {}
    others: set[str] = set()
    for path in map(Path, paths):
        file = next((f for f in (path / "result.json", path / "results.jsonl", path) if f.is_file()), None)
        if file is None:
            raise FedloraError(f"'{path}' holds no result: expected result.json, results.jsonl or a .jsonl file")
        text = file.read_text(encoding="utf-8", errors="replace")
        for i, line in enumerate([text] if file.suffix == ".json" else text.splitlines(), 1):
            record = parsed(line, f"line {i} of '{file}'")
            if (event := record.get("event", "result")) != "result":
                others.add(str(event))
            elif not isinstance(record.get("config"), dict):
                raise FedloraError(f"line {i} of '{file}' is no record of a run: it has no configuration")
            else:
                found[json.dumps(record["config"], sort_keys=True)] = record
    if not found:
        told = f"; there are records of another kind: {', '.join(sorted(others))}" if others else ""
        raise FedloraError(f"no finished run in {', '.join(map(str, paths))}{told}")
    return list(found.values())


def arms(results: Sequence[Result]) -> list[str]:
    """The arms (see `arm_of`), in the order in which they occur."""
    return list(dict.fromkeys(arm_of(r["config"]) for r in results))


def table_of(results: Sequence[Result], arm: str, protocol: str, metric: str = "dice") -> NDArray[np.float64]:
    """(seeds, sites) of one arm under one protocol, seeds ascending; no rows if the protocol was not measured.

    Under "leakage" a metric of `--leakage`, as its mean over the rounds: one column for the federation, but for
    "swap_drop", what a site loses with another site's private factors, "m7" and "heldout", which have one for each
    site. Runs that were stored before a metric was logged are left out, with a warning.
    """
    rows = sorted((r for r in results if arm_of(r["config"]) == arm), key=lambda r: r["config"]["seed"])
    if protocol == "leakage":
        found = [r["leakage"] for r in rows if "leakage" in r]
        values = [_leakage(each, metric) for each in found if metric in logged(each)]
        if len(values) < len(found):
            known = ", ".join(sorted(set().union(*map(logged, found))))
            told = f"{len(found) - len(values)} of {len(found)} runs of '{arm}' did not log '{metric}'; logged: {known}"
            warnings.warn(told, stacklevel=2)
    else:
        values = [[site[metric] for site in r["scores"][protocol].values()] for r in rows if protocol in r["scores"]]
    return np.array(values, dtype=float).reshape(len(values), len(values[0]) if values else 0)


SCORES = {"dice": "Dice", "accuracy": "accuracy"}  # of a segmentation, of a classification
BESIDE = ("_chance", "_95", "_start", "_rounds")  # what stands beside a metric of leakage, or says how it was had


def metric_of(results: Sequence[Result]) -> str:
    """Which of them the results have."""
    own = next(iter(results[0]["scores"]["personal"].values()))
    return next(name for name in SCORES if name in own)


def logged(found: dict[str, Any]) -> set[str]:
    """The metrics of a run's leakage: those at its end, and those that every round has."""
    rounds = [set(each) for each in found.get("rounds", [])]
    return found.keys() - {"rounds"} | (set.intersection(*rounds) if rounds else set())


def _leakage(found: dict[str, Any], metric: str) -> list[float]:
    if metric in found:
        return list(np.atleast_1d(found[metric]))
    return [float(np.mean([each[metric] for each in found["rounds"]]))]


def summary(results: Sequence[Result]) -> pd.DataFrame:
    """One row an arm: mean Dice or accuracy (± standard deviation over seeds), worst site, distances, costs."""
    rows, metric = [], metric_of(results)
    what = SCORES[metric]
    for method in arms(results):
        mine = [r for r in results if arm_of(r["config"]) == method]
        own = table_of(results, method, "personal", metric)
        far = {"HD95 (px)": f"{table_of(results, method, 'personal', 'hd95').mean():.1f}"} if metric == "dice" else {}
        spread = f" ± {own.mean(1).std(ddof=1):.3f}" if len(own) > 1 else ""
        new = table_of(results, method, "new site", metric)
        errors = [last for r in mine for last in r["agg_err"][-1:] if last is not None]
        sent = [each for r in mine for each in _sent(r)]
        took = [r["seconds"] for r in mine if r["seconds"] is not None]
        rows.append(
            {
                "method": title_of(method),
                f"personal {what}": f"{own.mean():.3f}{spread}",
                "worst site": f"{own.mean(0).min():.3f}",
            }
            | far
            | {
                f"global {what}": f"{table_of(results, method, 'global', metric).mean():.3f}",
                f"new-site {what}": f"{new.mean():.3f}" if new.size else "–",
                "trained": f"{mine[0]['trained']:,}",
                "KB up / client / round": f"{np.mean(sent) / 1e3:.1f}" if sent else "–",
                "agg. error": f"{np.mean(errors):.3f}" if errors else "–",
                "lr": ", ".join(sorted({f"{r['config']['lr']:g}" for r in mine})),
                "s / run": f"{np.mean(took):.0f}" if took else "–",
            }
            | privacy(mine)
        )
    return pd.DataFrame(rows).set_index("method").fillna("–")


def _sent(r: Result) -> list[float]:
    """Bytes up of one client in each round of which it may be told; records older than `clients` had all in each."""
    everybody = 1 if METHODS[r["config"]["method"]].pooled else len(r["scores"]["personal"])
    took_part = r.get("clients", [everybody] * len(r["bytes_up"]))
    return [up / clients for up, clients in zip(r["bytes_up"], took_part, strict=True) if up is not None]


def leakage_table(results: Sequence[Result]) -> pd.DataFrame:
    """What `--leakage` logged: mean over rounds (M5, M6: as they ended), sites and seeds; its level in brackets."""
    columns = {}
    for arm in arms(results):
        found = [logged(r["leakage"]) for r in results if arm_of(r["config"]) == arm and "leakage" in r]
        names = set.intersection(*found) if found else set()
        mean = {name: table_of(results, arm, "leakage", name).mean() for name in sorted(names)}
        columns[title_of(arm)] = {
            name: f"{value:.3g}" + (f" ({mean[level]:.3g})" if (level := f"{name}_chance") in mean else "")
            for name, value in mean.items()
            if not name.endswith(BESIDE)
        }
    return pd.DataFrame(columns).fillna("–").rename_axis("leakage (level)")


def refusals(results: Sequence[Result]) -> list[str]:
    """One line for every run whose server refused updates: they are in no mean."""
    return [
        f"{arm_of(r['config'])}, seed {r['config']['seed']}: {len(told)} updates refused, first {told[0]}"
        for r in results
        if (told := r.get("refused"))
    ]


def privacy(runs: Sequence[Result]) -> dict[str, str]:
    """What one image or client may reveal, with every number that the figure depends on; nothing without a mechanism.

    Runs that protect images and runs that protect clients do not belong together.
    """
    told = [r["privacy"] for r in runs if "privacy" in r]
    if not told:
        return {}

    def span(name: str, form: str) -> str:
        """One number, or the range over runs and clients."""
        values = np.array([p[name] for p in told]).ravel()
        ends = [f"{value:{form}}" for value in (values.min(), values.max())]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)

    epsilon = (
        f"{span('epsilon', '.3g')} at δ = {span('delta', 'g')} ({', '.join(sorted({p['accountant'] for p in told}))})"
    )
    [unit] = {p["unit"].partition(" more")[0] for p in told}
    return {
        f"ε for {unit}": epsilon,
        "σ": span("sigma", ".3g"),
        "q": span("q", ".3g"),
        "releases": span("releases", "d"),
    }


def differences(results: Sequence[Result], protocol: str = "personal") -> dict[tuple[str, str], Difference]:
    """Every pair of methods, over the seeds, data and sites that both have: (a, b) -> a - b in Dice or accuracy."""
    metric, out = metric_of(results), {}
    for a, b in _every_two(results):
        left, right, _ = matched(results, a, b, protocol)
        if left:
            mine, other = table_of(left, a, protocol, metric), table_of(right, b, protocol, metric)
            out[a, b] = paired_difference(mine, other)
    return out


def unpaired(results: Sequence[Result], protocol: str = "personal") -> list[str]:
    """A line for every pair of methods of which `differences` leaves runs out."""
    lines = []
    for a, b in _every_two(results):
        both, _, alone = matched(results, a, b, protocol)
        if alone:
            what = f"left out {', '.join(alone)}" if both else "no seed, data set and sites in common"
            lines.append(f"{title_of(a)} − {title_of(b)}: {what}")
    return lines


def _every_two(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Every later arm before every earlier one."""
    return [(a, b) for b, a in combinations(arms(results), 2)]


def difference_table(results: Sequence[Result], protocol: str = "personal") -> pd.DataFrame:
    """The same as text, with Holm-corrected p-values where there are seeds enough for a test."""
    pairs = differences(results, protocol)
    tested = {pair: d.p for pair, d in pairs.items() if d.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True)) if tested else {}
    rows = [
        {
            "difference": f"{title_of(a)} − {title_of(b)}",
            SCORES[metric_of(results)]: f"{d.mean:+.3f}",
            "95 % interval": f"[{d.low:+.3f}, {d.high:+.3f}]" if d.seeds > 1 else "–",  # one seed tells of its sites
            "p (Holm)": f"{corrected[a, b]:.3f}" if (a, b) in corrected else "–",
            "seeds": d.seeds,
        }
        for (a, b), d in pairs.items()
    ]
    return pd.DataFrame(rows).set_index("difference") if rows else pd.DataFrame()


TITLES = {
    "personal": "personal: each site's own model",
    "global": "global: one model for every site",
    "new site": "new site: never trained",
}


def _points(axis: Axes, results: Sequence[Result], protocol: str) -> None:
    """One marker a site (mean over seeds), a black bar for the mean over sites, its number at the top."""
    names, metric = arms(results), metric_of(results)
    places = np.arange(len(names))
    sites = list(next(r for r in results if protocol in r["scores"])["scores"][protocol])
    first = 0 if protocol != "new site" else 6  # unseen sites get colours of their own
    for k, site in enumerate(sites):
        values = [table_of(results, name, protocol, metric)[:, k].mean() for name in names]
        shift = (k - (len(sites) - 1) / 2) * min(0.12, 0.6 / len(sites))
        axis.plot(places + shift, values, "o", ms=5, label=site, alpha=0.85, color=f"C{(first + k) % 10}")
    means = [table_of(results, name, protocol, metric).mean() for name in names]
    axis.hlines(means, places - 0.36, places + 0.36, colors="black", lw=1.5, zorder=1)
    for x, y in enumerate(means):
        axis.annotate(f"{y:.3f}", (x, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
    axis.set_xticks(places, [title_of(name) for name in names], rotation=20, ha="right")
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_title(TITLES[protocol], fontsize=10)
    axis.grid(axis="y", alpha=0.3)


def _intervals(axis: Axes, pairs: dict[tuple[str, str], Difference], what: str) -> None:
    """One line a pair: the mean difference and its interval; green above zero, red below, grey across."""
    rows = list(pairs.items())[::-1]
    for y, (_, d) in enumerate(rows):
        known = d.seeds > 1  # an interval over the sites of one seed says nothing of others
        colour = "C2" if known and d.low > 0 else "C3" if known and d.high < 0 else "0.4"
        axis.plot([d.low, d.high] if known else [d.mean] * 2, [y, y], "-", color=colour, lw=2)
        axis.plot(d.mean, y, "o", color=colour)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [f"{title_of(a)} − {title_of(b)}" for (a, b), _ in rows], fontsize=8)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    least, most = (end(d.seeds for d in pairs.values()) for end in (min, max))
    axis.set_xlabel(f"difference in personal {what}{', 95 % interval' if most > 1 else ''}")
    seeds = f"{least}" if least == most else f"{least} to {most}"
    axis.set_title(f"paired over {seeds} seed{'s' * (most > 1)} and {rows[0][1].sites} sites", fontsize=10)
    axis.grid(axis="x", alpha=0.3)


def figure(results: Sequence[Result], most_pairs: int = 15) -> Figure:
    """Dice or accuracy by method and site for each protocol; below, the paired differences of the personal one.

    With more than `most_pairs` pairs, only those with the first method are drawn.
    """
    shown = [p for p in TITLES if any(p in r["scores"] for r in results)]
    pairs = differences(results)
    if len(pairs) > most_pairs:
        pairs = {pair: d for pair, d in pairs.items() if pair[1] == arms(results)[0]}
    width = max(10.0, 1.6 + 0.62 * len(shown) * len(arms(results)))
    below = 0.9 + 0.27 * len(pairs) if pairs else 0.0
    drawing = Picture(figsize=(width, 3.9 + below), layout="constrained")
    split: Any = drawing.subfigures(2, 1, height_ratios=[3.9, below]) if pairs else [drawing]
    top, *rest = split
    axes = top.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, protocol in zip(axes, shown, strict=True):
        _points(axis, results, protocol)
    axes[0].set_ylabel(f"{SCORES[metric_of(results)]} on test images")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high + 0.08 * (high - low))  # room for the numbers
    entries: dict[str, Artist] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    axes[-1].legend(
        entries.values(), entries.keys(), fontsize=8, title="site", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    for part in rest:
        _intervals(part.subplots(), pairs, SCORES[metric_of(results)])
    first, seeds = results[0]["config"], sorted({r["config"]["seed"] for r in results})
    budget = f"{first['rounds']} rounds × {first['steps']} steps, batch {first['batch']}"
    what = f"{Path(first['data']).stem}, {first['model']}, {budget}"
    top.suptitle(f"{what}, seeds {', '.join(map(str, seeds))}", fontsize=11)
    return drawing


def write_report(results: Sequence[Result], folder: str | Path) -> tuple[Path, Path]:
    """`report.md` with its tables and `report.png`; returns their paths. See `together` for what stands in them."""
    check(results)
    results, folder = told_apart(results), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, picture = folder / "report.md", folder / "report.png"
    parts = [markdown(summary(results))]
    changes = difference_table(results)
    parts += [markdown(frame) for frame in (changes, leakage_table(results)) if len(frame)]
    parts.append("\n".join(f"- {line}" for line in unpaired(results) + refusals(results)))
    text.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    figure(results).savefig(picture, dpi=130)
    return text, picture


def markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table."""
    rows = [[str(frame.index.name or ""), *map(str, frame.columns)]]
    rows += [[str(index), *map(str, values)] for index, values in zip(frame.index, frame.to_numpy(), strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
