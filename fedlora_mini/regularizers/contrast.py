"""-mu log( e^{cos(z,z_g)/τ} / (e^{cos(z,z_g)/τ} + e^{cos(z,z_p)/τ}) ): z near the global model's, far from the last.

z is the head's input averaged over the image, z_g that of the model at the round's start, z_p that of the client's own
model at the end of its last round (`~previous/…`, see the work `Remember`). MOON, Li, He and Song, CVPR 2021.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora_mini.accepted import ranges
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


def pooled(z: Tensor) -> Tensor:
    """(N, c, *S) -> (N, c); a vector (N, c) is one already."""
    return z.flatten(2).mean(2) if z.dim() > 2 else z


@dataclass(frozen=True)
class Contrast(Regularizer):
    """Zero until the client has a previous model."""

    mu: float = 1.0
    tau: float = 0.5

    features = True
    grouped = False

    def __post_init__(self) -> None:
        ranges(self, mu="[0, inf)", tau="(0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"model contrast, mu {self.mu:g}, tau {self.tau:g}"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        prefix = "~previous/"
        last = {n.removeprefix(prefix): t for n, t in context.kept.items() if n.startswith(prefix)}
        if not last:
            return 0.0
        with torch.no_grad():
            z_g, z_p = (pooled(context.run(other, context.x)[1]) for other in (context.start, last))
        z = pooled(context.z)
        scores = torch.stack([F.cosine_similarity(z, z_g), F.cosine_similarity(z, z_p)], 1) / self.tau  # (N, 2)
        return self.mu * F.cross_entropy(scores, scores.new_zeros(len(z), dtype=torch.long))
