"""What is measured."""

from fedlora_mini.metrics.classification import Recognition, recognise, recognition
from fedlora_mini.metrics.leakage import (
    leak_cos2,
    leak_energy,
    leak_explained,
    principal_angles,
    site_spread,
    subspace_overlap,
)
from fedlora_mini.metrics.noise import (
    NoiseEnergy,
    coupling_cosine,
    couplings,
    energy,
    expected_energy,
    injected_energy,
    noisy_steps,
    state_energy,
)
from fedlora_mini.metrics.probe import site_probe, swap_drop
from fedlora_mini.metrics.segmentation import Scores, evaluate, predict, score
from fedlora_mini.metrics.sharpness import Sharpness, balanced, direction, hvp, lambda_max, landscape

__all__ = [
    "NoiseEnergy",
    "Recognition",
    "Scores",
    "Sharpness",
    "balanced",
    "coupling_cosine",
    "couplings",
    "direction",
    "energy",
    "evaluate",
    "expected_energy",
    "hvp",
    "injected_energy",
    "lambda_max",
    "landscape",
    "leak_cos2",
    "leak_energy",
    "leak_explained",
    "noisy_steps",
    "predict",
    "principal_angles",
    "recognise",
    "recognition",
    "score",
    "site_probe",
    "site_spread",
    "state_energy",
    "subspace_overlap",
    "swap_drop",
]
