"""Differential privacy: what no single sample, or no single client, can move by much."""

from fedlora_mini.privacy.accountant import ACCOUNTANTS, Release, epsilon, rdp
from fedlora_mini.privacy.calibration import calibrate
from fedlora_mini.privacy.clip import CLIPS, clip_sum, norms
from fedlora_mini.privacy.dpsgd import DPSGD, Guarded
from fedlora_mini.privacy.filters import Doppler, Laplacian, LowPass, Rescale
from fedlora_mini.privacy.ledger import BudgetSpent, Ledger
from fedlora_mini.privacy.noise import Secure, Seeded, add_noise
from fedlora_mini.privacy.sampling import poisson, rate

__all__ = [
    "ACCOUNTANTS",
    "CLIPS",
    "DPSGD",
    "BudgetSpent",
    "Doppler",
    "Guarded",
    "Laplacian",
    "Ledger",
    "LowPass",
    "Release",
    "Rescale",
    "Secure",
    "Seeded",
    "add_noise",
    "calibrate",
    "clip_sum",
    "epsilon",
    "norms",
    "poisson",
    "rate",
    "rdp",
]
