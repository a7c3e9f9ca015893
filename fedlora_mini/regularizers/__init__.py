"""What a method adds to the task loss, or does after the optimiser's step."""

from fedlora_mini.regularizers.anchor import Anchor
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.budget import RankBudget
from fedlora_mini.regularizers.decay import WeightDecay
from fedlora_mini.regularizers.flat import FlatNoise
from fedlora_mini.regularizers.growth import Growth
from fedlora_mini.regularizers.mask import InputMask
from fedlora_mini.regularizers.orthogonal import Diversity, Orthogonality
from fedlora_mini.regularizers.preconditioner import Riemannian
from fedlora_mini.regularizers.sparse import L1, GroupLasso
from fedlora_mini.regularizers.spectral import NuclearFrobenius, NuclearNorm

__all__ = [
    "L1",
    "Anchor",
    "Context",
    "Diversity",
    "FlatNoise",
    "GroupLasso",
    "Growth",
    "InputMask",
    "NuclearFrobenius",
    "NuclearNorm",
    "Orthogonality",
    "RankBudget",
    "Regularizer",
    "Riemannian",
    "WeightDecay",
]
