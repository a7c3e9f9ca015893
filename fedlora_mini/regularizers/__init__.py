"""What a method adds to the task loss, or does after the optimiser's step."""

from fedlora_mini.regularizers.anchor import Anchor
from fedlora_mini.regularizers.base import Context, Regularizer

__all__ = ["Anchor", "Context", "Regularizer"]
