"""Real MNI152 T1 anatomy, SIMULATED sites: axial slices of one template, shown and annotated in each site's own way.

Grey and white matter come from the template's own tissue probabilities (nilearn ships them: no download). Mask:
0 elsewhere, 1 grey matter, 2 white matter; a site's annotation rule thresholds those probabilities and moves outlines.
Source: Fonov et al., NeuroImage 54:313 (2011), ICBM 152 non-linear 2009a.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.data.seeds import generator
from fedlora_mini.data.shift import (
    UNSEEN,
    Supervision,
    apply_appearance,
    apply_supervision,
    signed_distance,
    site_shifts,
)
from fedlora_mini.errors import FedloraError

PATTERN = ("train", "val", "train", "test", "train", "train", "test", "train", "val", "train")  # bands, bottom to top
GAP = 3  # slices (mm) left out where one split meets another
LEAST_TISSUE = 0.05  # share of a slice that must be grey or white matter
CORTEX = 1.0  # width of the outer rim that a site may leave out, pixels at 64 (about one cortical thickness)
NOTE = (
    "Real anatomy (MNI152 T1, one template), SIMULATED sites: every site's shift is in its record. Splits are separate "
    "bands of slices with 3 mm between them, the same for all sites; within a band, sites take turns slice by slice. "
    "One volume allows no more: test slices are of the same brain as training slices, so scores are optimistic."
)


def bands(first: int, last: int) -> dict[str, list[int]]:
    """Slices first..last cut into ten bands by PATTERN; the first GAP slices after a change of split are left out."""
    edges = np.linspace(first, last + 1, len(PATTERN) + 1).round().astype(int)
    chosen: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for band, part in enumerate(PATTERN):
        skip = GAP if band and PATTERN[band - 1] != part else 0
        chosen[part].extend(range(edges[band] + skip, edges[band + 1]))
    return chosen


def template(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """T1, grey and white matter probability as axial slices (S, size, size) in [0, 1], padded to squares first."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise FedloraError(
            "the 'brain' data set needs the package nilearn: pip install nilearn (or pip install 'fedlora_mini[brain]')"
        ) from error
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    volumes = [np.asarray(load(resolution=1).dataobj, np.float32) for load in loaders]  # (197, 233, 189)
    t1, grey, white = (_squares(torch.from_numpy(v), size) for v in volumes)
    return (t1 / t1.max()).clamp(0, 1), grey, white


def _squares(volume: Tensor, size: int) -> Tensor:
    """(X, Y, Z) -> (Z, size, size), nose up: area average after padding the shorter axis with air."""
    slices = volume.permute(2, 1, 0).flip(1)  # (Z, Y, X)
    height, width = slices.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = torch.nn.functional.pad(slices, (left, side - width - left, top, side - height - top))
    mode = "area" if size <= side else "bilinear"
    return torch.nn.functional.interpolate(padded[:, None], size=(size, size), mode=mode)[:, 0]


def annotate(grey: Tensor, white: Tensor, rule: Supervision) -> Tensor:
    """brain = [grey + white >= t], white matter = [white >= t] on top of it, then both outlines moved. uint8."""
    layers = torch.stack([grey + white >= rule.threshold, white >= rule.threshold], 1)
    moved = replace(rule, threshold=0.5)  # the threshold has done its work on the real probabilities
    return apply_supervision(signed_distance(layers), moved, rimmed=(0,), rim_width=CORTEX)


def load_brain(
    size: int = 64,
    seed: int = 0,
    *,
    n_sites: int = 3,
    n_unseen: int = 1,
    appearance: float | Sequence[Any] = 1.0,
    supervision: float | Sequence[Any] = 0.0,
) -> Dataset:
    """Simulated sites on one real brain; `appearance` and `supervision` as in the phantom."""
    total = n_sites + n_unseen
    if n_sites < 1 or not 1 <= total <= 8:
        raise FedloraError(f"one volume gives 1 to 8 simulated sites, got n_sites={n_sites} and n_unseen={n_unseen}")
    t1, grey, white = template(size)
    tissue = ((grey + white) >= 0.5).flatten(1).float().mean(1)
    usable = (tissue >= LEAST_TISSUE).nonzero().flatten()
    chosen = bands(int(usable[0]), int(usable[-1]))
    sites = []
    for turn, (k, look, rule) in enumerate(site_shifts(seed, n_sites, n_unseen, appearance, supervision)):
        parts, used = [], {}
        for number, (part, every) in enumerate(chosen.items()):
            used[part] = every[turn::total]
            image = apply_appearance(t1[used[part]][:, None], look, generator(seed, k, number))
            parts.append(
                Split(image.expand(-1, 3, -1, -1).contiguous(), annotate(grey[used[part]], white[used[part]], rule))
            )
        record = {
            "origin": "simulated site, real anatomy",
            "seed": seed,
            "index": k,
            "slices": used,
            "appearance": look.record(),
            "supervision": rule.record(),
        }
        name = f"simulated{k + 1}" if k < UNSEEN else f"simulated-unseen{k - UNSEEN + 1}"
        sites.append(Site(name, parts[0], parts[1], parts[2], record))
    return Dataset(
        name="brain (simulated sites)",
        sites=tuple(sites[:n_sites]),
        unseen=tuple(sites[n_sites:]),
        classes=("background", "grey matter", "white matter"),
        note=NOTE,
        licence="ICBM 152 template: free use with its copyright notice; shipped with nilearn (BSD-3-Clause)",
    )
