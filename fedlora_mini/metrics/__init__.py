"""What is measured."""

from fedlora_mini.metrics.leakage import (
    leak_cos2,
    leak_energy,
    leak_explained,
    principal_angles,
    site_spread,
    subspace_overlap,
)
from fedlora_mini.metrics.probe import site_probe, swap_drop
from fedlora_mini.metrics.segmentation import Scores, evaluate, predict, score

__all__ = [
    "Scores",
    "evaluate",
    "leak_cos2",
    "leak_energy",
    "leak_explained",
    "predict",
    "principal_angles",
    "score",
    "site_probe",
    "site_spread",
    "subspace_overlap",
    "swap_drop",
]
