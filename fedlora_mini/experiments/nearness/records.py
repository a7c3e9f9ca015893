"""One record a data set, network and seed, as `results/nearness.jsonl` holds them, and their table."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora_mini.adapters import freeze, region
from fedlora_mini.adapters.ops import matrix_shape
from fedlora_mini.data import Dataset
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import dataset_of
from fedlora_mini.experiments.lines import read_lines, write_lines
from fedlora_mini.experiments.nearness.features import IMAGES, PLACES, adapted_layers, inputs
from fedlora_mini.experiments.nearness.maps import beside, between
from fedlora_mini.experiments.nearness.prediction import REGIONS, costs, lean, margins
from fedlora_mini.experiments.nearness.updates import STARTS, dealt, errors_of, local_updates
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.experiments.report import Result
from fedlora_mini.models import load_base

SHIFTS = {"none": (0, 0), "appearance": (1, 0), "supervision": (0, 1), "both": (1, 1)}  # strengths of the phantom's two
CASES: dict[str, dict[str, Any]] = {
    **{
        f"phantom, {name}": {"data": "phantom", "data_options": {"appearance": a, "supervision": s}}
        for name, (a, s) in SHIFTS.items()
    },
    **{name: {"data": name} for name in ("polypgen", "nuclei", "lgg")},
}
NETWORKS = {"minisam": "auto", "efficientnet": "imagenet"}
BUDGET: dict[str, Any] = {
    "rounds": 1,
    "steps": 30,
    "batch": 8,
    "rank": 4,
    "execution": "sequential",
    "device": "cpu",
    "threads": 1,
}
EVERY_START = [("phantom, none", "minisam", 0), ("phantom, both", "minisam", 0), ("polypgen", "minisam", 0)]
EVENT = "nearness"  # of a line: it is no run, and `report.read_results` leaves it alone


def config_of(case: str, network: str, seed: int, **changes: Any) -> RunConfig:
    """The configuration of a record."""
    return RunConfig("local", model=network, base=NETWORKS[network], seed=seed, **CASES[case], **(BUDGET | changes))


def starts_of(case: str, network: str, seed: int) -> tuple[str, ...]:
    """How the updates of a record are trained: in three of them in every way, since the ways agree there.

    Real sites have their images dealt anew as a null; the phantom's is its own case without a shift.
    """
    if (case, network, seed) in EVERY_START:
        return (*STARTS, "dealt")
    return ("dense",) if case.startswith("phantom") else ("dense", "dealt")


def measure(
    model: nn.Module,
    data: Dataset,
    config: RunConfig,
    starts: Sequence[str] = ("dense", "dealt"),
    twin: Dataset | None = None,
) -> Result:
    """The record of one data set, network and seed: features and updates of every adapted layer of a plain `model`.

    starts: how the sites' updates are trained (`updates.STARTS`); "dealt" is "dense" on images dealt anew, its null.
    twin: the same images shown without a site's shift, for `maps.paired_map`.
    """
    began, r, seed = perf_counter(), config.rank, config.seed
    freeze(model)
    layers: dict[str, dict[str, Any]] = {
        path: {"region": region(model, path), "shape": list(matrix_shape(layer))}
        for path, layer in adapted_layers(model).items()
    }
    rows = [inputs(model, site.train, seed=seed) for site in data.sites]
    plain = [inputs(model, site.train, seed=seed) for site in twin.sites] if twin else []
    for path, own in layers.items():
        sites = [each[path] for each in rows]
        own["features"] = between(sites, r, seed)
        if plain:
            own["features"]["paired"] = beside(sites, [each[path] for each in plain], r)
    losses = {}
    for start in starts:
        source, how = (dealt(data, seed), "dense") if start == "dealt" else (data, start)
        train = [site.train for site in source.sites]
        updates, losses[start] = local_updates(model, train, config.budget, how, r, seed)
        for path, errors in errors_of(updates, r, seed).items():
            layers[path][start] = errors
    return {
        "event": EVENT,
        "config": config.asdict() | {"images": IMAGES, "places": PLACES},
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "sites": {site.name: len(site.train) for site in data.sites},
        "losses": losses,
        "layers": layers,
        "seconds": perf_counter() - began,
    }


def study(
    out: Path,
    cases: Sequence[str] = tuple(CASES),
    networks: Sequence[str] = tuple(NETWORKS),
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[Result], None] = lambda record: None,
) -> list[Result]:
    """Every case, network and seed; one line each is added to `out`, and what stands there is not made again."""
    torch.set_num_threads(BUDGET["threads"])
    records = read(out) if out.is_file() else []
    done = [RunConfig().asdict() | r["config"] for r in records]  # settings later than a record are at rest in it
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for case in cases:
            for network in networks:
                config = config_of(case, network, seed)
                if config.asdict() | {"images": IMAGES, "places": PLACES} in done:
                    continue
                data = dataset_of(config)
                looks = config.data_options.get("appearance", 0)
                twin = dataset_of(config.but(data_options=config.data_options | {"appearance": 0})) if looks else None
                model = load_base(network, len(data.classes), data.spatial, config.base, seed)
                record = {"case": case} | measure(model, data, config, starts_of(case, network, seed), twin)
                records.append(record)
                write_lines(out, records)
                progress(record)
    return records


def read(path: Path) -> list[Result]:
    """The records of a file that `study` wrote."""
    if not path.is_file():
        raise FedloraError(f"'{path}' holds no record: expected a file that `nearness.study` wrote")
    return read_lines(path)


def of(records: Sequence[Result], case: str, network: str) -> list[Result]:
    """The records of one data set and network, by seed."""
    found = [r for r in records if r["case"] == case and r["config"]["model"] == network]
    if not found:
        known = ", ".join(sorted({f"{r['case']} / {r['config']['model']}" for r in records}))
        raise FedloraError(f"no record of {case} / {network}; there are: {known or 'none'}")
    return sorted(found, key=lambda r: r["config"]["seed"])


def number(records: Sequence[Result], region: str, *names: str) -> float:
    """The mean over seeds and a region's layers of what stands under `names` in a layer, as far as it does."""
    found: list[float] = []
    for layer in (layer for r in records for layer in r["layers"].values() if layer["region"] == region):
        for name in names:
            layer = layer.get(name, {})
        found += [] if isinstance(layer, dict) else [layer]
    return float(np.mean(found)) if found else float("nan")


def null_of(records: Sequence[Result], own: Sequence[Result], region: str) -> NDArray[np.float64] | float:
    """The margins of `own` without sites: its images dealt anew, or the phantom without a shift; else NaN."""
    if all("dealt" in r["losses"] for r in own):
        return margins(own, region, "dealt")
    seeds = {r["config"]["seed"] for r in own}
    plain = [r for r in records if r["case"] == "phantom, none" and r["config"]["model"] == own[0]["config"]["model"]]
    plain = [r for r in plain if r["config"]["seed"] in seeds]
    return margins(plain, region) if own[0]["config"]["data"] == "phantom" and len(plain) == len(own) else float("nan")


def table(records: Sequence[Result]) -> pd.DataFrame:
    """One row a data set, network and region: sizes of the maps (and of their null), what sharing costs, who shares.

    "A - B" is by how much one A costs more than one B, "by sites" the same beyond its null.
    """
    rows = []
    for case, network in dict.fromkeys((r["case"], r["config"]["model"]) for r in records):
        own = of(records, case, network)
        for part in REGIONS:
            whole, sites = lean(own, part), lean(own, part, null_of(records, own, part))
            features = {
                name: partial(number, own, part, "features", name) for name in ("monge", "monge null", "classes")
            }
            rows.append(
                {
                    "data": case,
                    "network": network,
                    "region": part,
                    "seeds": len(own),
                    "Monge (null)": f"{features['monge']('strength'):.3f} ({features['monge null']('strength'):.3f})",
                    "rank": f"{features['monge']('rank'):.1f}",
                    "within r": f"{features['monge']('within'):.2f}",
                    "means": f"{features['monge']('mean'):.2f}",
                    "classes": f"{features['classes']('strength'):.2f}",
                    "cost of A": f"{costs(own, part, 'A').mean():.3f}",
                    "cost of B": f"{costs(own, part, 'B').mean():.3f}",
                    "A - B": str(whole),
                    "by sites": str(sites),
                    "share": whole.factor or "either",
                }
            )
    return pd.DataFrame(rows)
