"""lam Σ_y ||z̄_y - c̄_y||² / (classes seen): the image's class means stay near the server's. FedProto, Tan et al. 2022.

For segmentation z̄_y is the mean of the head's input over the voxels of class y in the batch (masked average pooling);
the mean over channels keeps lam independent of their number. Our port: the paper classifies images.
"""

from dataclasses import dataclass

from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.features import class_means
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


def distance(z: Tensor, masks: Tensor, target: Tensor) -> Tensor:
    """Mean over the classes that are seen on both sides of the mean square of z̄_y - c_y. target: (C, c), 0 = unseen."""
    means, counts = class_means(z, masks, len(target))
    seen = (counts > 0) & target.any(1)
    return ((means - target).square().mean(1) * seen).sum() / seen.sum().clamp(min=1)


@dataclass(frozen=True)
class NearPrototypes(Regularizer):
    """Reads the note `~prototype` (C, c) that the server sends; nothing before the second round."""

    lam: float = 1.0

    features = True

    def __post_init__(self) -> None:
        ranges(self, lam="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"near the common prototypes, lam {self.lam:g}"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        common = context.kept.get("~prototype")
        return 0.0 if common is None else self.lam * distance(context.z, context.y, common)
