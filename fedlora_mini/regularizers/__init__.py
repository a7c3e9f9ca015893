"""What a method adds to the task loss, or does after the optimiser's step."""

from fedlora_mini.regularizers.anchor import Anchor
from fedlora_mini.regularizers.ascent import Ascent
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.budget import RankBudget
from fedlora_mini.regularizers.contrast import Contrast
from fedlora_mini.regularizers.decay import WeightDecay
from fedlora_mini.regularizers.distill import Distill
from fedlora_mini.regularizers.episode import Episode
from fedlora_mini.regularizers.flat import FlatNoise
from fedlora_mini.regularizers.growth import Growth
from fedlora_mini.regularizers.harmony import Harmonised
from fedlora_mini.regularizers.mask import InputMask
from fedlora_mini.regularizers.orthogonal import Diversity, Orthogonality
from fedlora_mini.regularizers.preconditioner import Riemannian
from fedlora_mini.regularizers.prototype import NearPrototypes
from fedlora_mini.regularizers.sparse import L1, GroupLasso
from fedlora_mini.regularizers.spectral import NuclearFrobenius, NuclearNorm
from fedlora_mini.regularizers.subspace import SOR

__all__ = [
    "L1",
    "SOR",
    "Anchor",
    "Ascent",
    "Context",
    "Contrast",
    "Distill",
    "Diversity",
    "Episode",
    "FlatNoise",
    "GroupLasso",
    "Growth",
    "Harmonised",
    "InputMask",
    "NearPrototypes",
    "NuclearFrobenius",
    "NuclearNorm",
    "Orthogonality",
    "RankBudget",
    "Regularizer",
    "Riemannian",
    "WeightDecay",
]
