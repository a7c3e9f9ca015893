"""The records as a picture: how strong and of what rank the maps are in every layer, and what sharing A or B costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedlora_mini.experiments.nearness.records import of
from fedlora_mini.experiments.report import Result
from fedlora_mini.picture import Picture

COLOURS = {"A": "C1", "B": "C0"}


def values(records: Sequence[Result], *path: str) -> NDArray[np.float64]:
    """(seeds, layers) of one number of every layer; NaN where a record lacks it."""

    def find(layer: object) -> float:
        for name in path:
            layer = layer.get(name, {}) if isinstance(layer, dict) else {}
        return float(layer) if isinstance(layer, int | float) else float("nan")

    return np.array([[find(layer) for layer in r["layers"].values()] for r in records])


def _line(axis: Axes, table: NDArray[np.float64], colour: str, label: str, style: str = "-o") -> None:
    """The mean over seeds, and the seeds' range as a band."""
    place = np.arange(table.shape[1])
    axis.plot(place, table.mean(0), style, color=colour, ms=3, lw=1.2, label=label)
    axis.fill_between(place, table.min(0), table.max(0), color=colour, alpha=0.15, lw=0)


def _columns(records: Sequence[Result], axes: Sequence[Axes]) -> None:
    """The three panels of one data set."""
    strength, rank, cost = axes
    r = records[0]["config"]["rank"]
    _line(strength, values(records, "features", "monge", "strength"), "C2", "Monge map")
    _line(strength, values(records, "features", "monge null", "strength"), "0.5", "halves of one site", "--")
    _line(strength, values(records, "features", "classes", "strength"), "C4", "class means", ":s")
    strength.set_yscale("log")
    _line(rank, values(records, "features", "monge", "rank"), "C2", "Monge map, 90 %")
    _line(rank, values(records, "features", "monge null", "rank"), "0.5", "halves of one site", "--")
    rank.axhline(r, color="black", lw=0.8, label=f"r = {r}")
    least, least_dealt = (values(records, start, "own") for start in ("dense", "dealt"))
    for factor, colour in COLOURS.items():
        _line(cost, values(records, "dense", factor) - least, colour, f"one {factor}")
        _line(cost, values(records, "dealt", factor) - least_dealt, colour, f"one {factor}, images dealt", ":")
        _line(cost, values(records, "dense", f"{factor} turned") - least, colour, f"one {factor}, turned", "--")
    regions = [layer["region"] for layer in records[0]["layers"].values()]
    for axis in axes:
        axis.axvspan(regions.index("decoder") - 0.5, len(regions) - 0.5, color="0.93", zorder=0)
        axis.set_xlim(-0.5, len(regions) - 0.5)
        axis.grid(axis="y", alpha=0.3)


def figure(records: Sequence[Result], cases: Sequence[str], network: str = "minisam") -> Figure:
    """A column a data set: size of the maps, their rank against r, and the updates' losses by one A or one B.

    Layers from left to right in the network's order, the decoder's on grey; bands are the range over seeds.
    """
    drawing = Picture(figsize=(3.1 * len(cases) + 1.6, 7.2), layout="constrained")
    axes = drawing.subplots(3, len(cases), squeeze=False, sharey="row", sharex="col")
    for column, case in zip(axes.T, cases, strict=True):
        own = of(records, case, network)
        _columns(own, column)
        column[0].set_title(f"{case}, {len(own)} seed" + "s" * (len(own) > 1), fontsize=10)
        column[2].set_xlabel("adapted layer")
    for axis, label in zip(
        axes[:, 0], ("E||(T − I)x||² / E||x||²", "rank of T − I", "energy lost beyond rank r"), strict=True
    ):
        axis.set_ylabel(label)
    for axis in axes[:, -1]:
        axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing
