"""How far outlines of the same object differ, and how much of it is an even rule: four real readers beside the phantom.

`even` is the share of the disagreement 1 - Dice that goes away if one outline may move by one distance everywhere, the
best one for this object and pair. A simulated supervision shift is such a rule; what real readers leave is shape.
`python -m fedlora_mini.experiments.raters results/raters.jsonl` writes one line a case; it needs the data set lidc.
"""

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_mini.data import lidc, phantom
from fedlora_mini.data.seeds import generator
from fedlora_mini.data.shift import site_supervision
from fedlora_mini.data.supervision import signed_distance
from fedlora_mini.experiments.checkpoint import write_atomically
from fedlora_mini.experiments.lines import records_file
from fedlora_mini.experiments.provenance import machine, versions

MOVES = torch.arange(-8, 8.1, 0.5)  # pixels
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 1.0)
SITES, ANATOMIES = 4, 48


def overlap(masks: Tensor, other: Tensor) -> Tensor:
    """Dice of each of (K, H, W) with (H, W); 1 if both are empty."""
    total = masks.sum((1, 2)) + other.sum()
    return torch.where(total > 0, 2 * (masks & other).sum((1, 2)) / total.clamp(min=1), 1.0)


def even(masks: Tensor, moves: Tensor = MOVES) -> tuple[float, float]:
    """(mean Dice of all ordered pairs of raters, the same after the first's best even move). masks: (N, R, H, W)."""
    as_is, moved = [], []
    for drawn in masks.bool():
        away = signed_distance(drawn)  # (R, H, W)
        for i, j in permutations(range(len(drawn)), 2):
            as_is.append(float(overlap(drawn[i][None], drawn[j])[0]))
            best = float(overlap(away[i] <= moves[:, None, None], drawn[j]).max())
            moved.append(max(best, as_is[-1]))  # an empty mask cannot move
    return float(np.mean(as_is)), float(np.mean(moved))


def simulated(strength: float, seed: int = 0) -> Tensor:
    """The phantom's organs as four sites of that strength draw them: (N, 4, 64, 64), organs that all four draw."""
    rules = [site_supervision(seed, k).scaled(strength) for k in range(SITES)]
    seen = [phantom.sample(ANATOMIES, 64, generator(seed, 77), supervision=rule)[1] for rule in rules]
    organs = [torch.stack([masks == c for masks in seen], 1) for c in range(1, len(phantom.CLASSES))]
    found = torch.cat(organs)  # (classes * N, 4, 64, 64)
    return found[found.flatten(2).any(2).all(1)].to(torch.uint8)


def measure(masks: Tensor) -> dict[str, Any]:
    """Dice by object, distance of outlines (pixels of 64), share of objects with an area twice another's, `even`."""
    found = lidc.agreement(masks)
    before, after = even(masks)
    return {
        "objects": len(masks),
        "dice": [round(float(d), 4) for d in found["dice"].mean(1)],
        "distance": round(float(found["distance"].nanmedian()) * 64 / masks.shape[-1], 3),
        "twice": round(found["twice"], 3),
        "even": round((after - before) / (1 - before), 3),
    }


def records() -> Iterator[dict[str, Any]]:
    """The real readers, then the phantom by strength."""
    about = {"event": "raters", "versions": versions(), "machine": machine(torch.device("cpu"))}
    yield {**about, "case": "lidc", "strength": None, **measure(lidc.raters(lidc.SIDE)[1])}
    for strength in STRENGTHS:
        yield {**about, "case": "phantom", "strength": strength, **measure(simulated(strength))}


def main(path: Path) -> None:
    """Write the records."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(records_file())
