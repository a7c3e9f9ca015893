"""Networks to adapt."""

from fedlora_mini.models.minisam import MiniSAM
from fedlora_mini.models.pretrained import BASES, load_base
from fedlora_mini.models.zoo import CLASSIFIERS, MODELS, build

__all__ = ["BASES", "CLASSIFIERS", "MODELS", "MiniSAM", "build", "load_base"]
