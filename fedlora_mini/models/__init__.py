"""Networks to adapt."""

from fedlora_mini.models.minisam import MiniSAM
from fedlora_mini.models.pretrained import load_base
from fedlora_mini.models.zoo import MODELS, build

__all__ = ["MODELS", "MiniSAM", "build", "load_base"]
