"""What a base gives at real sites before anything is trained: Dice at the start of a run, whose head is new.

Beside it "everything": the Dice of calling every pixel the first foreground class, which needs no network. A line a set
and seed: `python -m fedlora_mini.experiments.unadapted results/unadapted.jsonl`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fedlora_mini.experiments.checkpoint import write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.metrics.segmentation import score

SETS: dict[str, tuple[dict[str, Any], range]] = {  # settings and seeds as in results/hospitals_*.jsonl, nuclei_domains
    "lgg": ({"size": 64}, range(6)),
    "polypgen": ({"size": 64, "model": "efficientnet", "base": "imagenet"}, range(4)),
    "nuclei": ({"size": 64, "data_options": {"per_site": 250, "val": 60}}, range(6)),
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


def main(path: Path) -> None:
    """Make the stored records again."""
    torch.set_num_threads(1)
    records = [
        measure(RunConfig("local", name, threads=1, device="cpu", seed=seed, **settings))
        for name, (settings, seeds) in SETS.items()
        for seed in seeds
    ]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
