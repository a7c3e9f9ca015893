"""r_l, a rank of its own for every layer, fixed before training from the frozen weight or from the depth."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.adapters.ops import to_matrix
from fedlora_mini.errors import FedloraError

RankRule = Callable[..., int]
"""(layer, depth in [0, 1], **options) -> r, at least 1."""


def spectrum(layer: Any) -> Tensor:
    """Singular values of the layer's weight as a matrix, largest first, in float64."""
    return torch.linalg.svdvals(to_matrix(layer, layer.weight.detach()).double())


def stable_rank(W: Tensor) -> float:
    """||W||_F² / ||W||_2², between 1 and the rank; 0 for a zero matrix."""
    sigma = torch.linalg.svdvals(W.detach().double())
    return float(sigma.square().sum() / sigma[0].square()) if sigma[0] > 0 else 0.0


def _at_most(r: int, largest: int | None) -> int:
    if largest is not None and largest < 1:
        raise FedloraError(f"largest is a rank of at least 1, got {largest}")
    return max(1, r if largest is None else min(r, largest))


def by_stable_rank(layer: Any, depth: float, *, largest: int | None = None) -> int:
    """r = round(||W_0||_F² / ||W_0||_2²), at most `largest`. SR-LoRA, Zhang et al. 2025."""
    return _at_most(round(stable_rank(to_matrix(layer, layer.weight))), largest)


def by_spectrum(layer: Any, depth: float, *, tau: float = 0.3, largest: int | None = None) -> int:
    """r = min{k : σ_1 + … + σ_k ≥ τ (σ_1 + … + σ_min(m, n))}, at most `largest`. SARA, Gu et al. 2024.

    The paper's τ is not known to us: 0.3 is ours. In the body of the pre-trained MiniSAM it keeps 15 to 25 % of a
    layer's directions.
    """
    if not 0 < tau <= 1:
        raise FedloraError(f"tau is a share of the spectrum in (0, 1], got {tau}")
    sigma = spectrum(layer)
    short = sigma.cumsum(0) < tau * sigma.sum() * (1 - 1e-12)  # two orders of summation differ in the last digits
    return _at_most(int(short.sum()) + 1, largest)


def by_depth(layer: Any, depth: float, *, first: int = 4, last: int = 12) -> int:
    """r grows linearly with depth: first + (last - first) depth. PRILoRA, Benedek and Wolf 2024."""
    for name, rank in (("first", first), ("last", last)):
        if rank < 1:
            raise FedloraError(f"{name} is a rank of at least 1, got {rank}")
    return round(first + (last - first) * depth)
