"""What a base gives at real sites before anything is trained: Dice at the start of a run, whose head is new.

Beside it "everything": the Dice of calling every pixel the first foreground class, which needs no network. A line a set
and seed: `python -m fedlora_mini.experiments.unadapted results/unadapted.jsonl`. Names behind the path make the records
of these sets alone and leave the others as they are stored.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fedlora_mini.errors import unknown
from fedlora_mini.experiments.checkpoint import write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.lines import records_file
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.metrics.segmentation import score

SETS: dict[str, tuple[dict[str, Any], range]] = {  # settings and seeds as in results/hospitals_*.jsonl
    "lgg": ({"data": "lgg", "size": 64}, range(6)),
    "polypgen": ({"data": "polypgen", "size": 64, "model": "efficientnet", "base": "imagenet"}, range(6)),
    "polypgen_minisam": ({"data": "polypgen", "size": 64}, range(6)),
    "nuclei": ({"data": "nuclei", "size": 64, "data_options": {"per_site": 250, "val": 60}}, range(6)),
}
EVENT = "unadapted"  # of a line: no run, and `report.read_results` leaves it alone


def measure(config: RunConfig) -> dict[str, Any]:
    """The record of one data set and seed: scores on test data of a federation of which no round has run."""
    federation = Federation.build(config)
    data = federation.data
    everything = {
        site.name: score(torch.ones_like(site.test.masks), site.test.masks, data.classes, hd95=False).dice
        for site in (*data.sites, *data.unseen)
    }
    return {
        "event": EVENT,
        "config": config.asdict(),
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "scores": federation.evaluate(hd95=False, protocols=("personal", "new site")),
        "everything": everything,
    }


def config_of(name: str, seed: int) -> RunConfig:
    """The run whose start is measured."""
    return RunConfig(method="local", threads=1, device="cpu", seed=seed, **SETS[name][0])


def key_of(config: dict[str, Any]) -> tuple[str, str, int]:
    """What tells one record from another: data, network, seed."""
    return config["data"], config["model"], config["seed"]


def main(path: Path, *names: str) -> None:
    """Make the records of these sets again (of all if none is named), in the order of SETS; others stay as stored."""
    for name in names:
        if name not in SETS:
            raise unknown("set", name, SETS)
    torch.set_num_threads(1)
    stored, lines = {}, []
    if names and path.is_file():
        stored = {key_of(json.loads(line)["config"]): line for line in path.read_text(encoding="utf-8").splitlines()}
    for name, (_, seeds) in SETS.items():
        for config in (config_of(name, seed) for seed in seeds):
            if not names or name in names:
                lines.append(json.dumps(measure(config)))
            elif key_of(config.asdict()) in stored:
                lines.append(stored[key_of(config.asdict())])
    write_atomically(path, "".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main(records_file(), *sys.argv[2:])
