"""ΔW(x) = B diag(Σ_j ω_j(x) v_j) A: a router mixes several vectors of singular values, all else is frozen.

The router's pieces are functions, for the other adapters that mix by x (`hydra`, `calibrated`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.ops import down, group_size, matrix_shape, to_matrix, up
from fedlora_mini.errors import FedloraError


def pooled(layer: Any, x: Tensor) -> Tensor:
    """x̄: the mean over tokens or voxels for every row of the batch, (N, c)."""
    if x.dim() == 2:
        return x
    last = isinstance(layer, (nn.Linear, nn.LayerNorm))  # where the channels stand; else second
    return x.flatten(1, -2).mean(1) if last else x.flatten(2).mean(2)


def inputs(layer: Any) -> int:
    """The width of x̄."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def router_of(base: Any, experts: int, generator: torch.Generator | None) -> nn.Parameter:
    """(k, c_in) ~ N(0, 0.02²): from the first step on every expert has another gradient."""
    router = 0.02 * torch.randn(experts, inputs(base), generator=generator or torch.default_generator)
    return nn.Parameter(router.to(base.weight))


def route(layer: Any, x: Tensor, router: Tensor) -> Tensor:
    """ω(x) = softmax(router x̄) for every row of the batch: (N, k). router: (k, c) or (G, k, c)."""
    router = router.reshape(-1, *router.shape[-2:])
    G = len(router)
    omega = (pooled(layer, x).reshape(G, group_size(x, G), -1) @ router.mT).softmax(-1)  # (G, N/G, k)
    return omega.flatten(0, 1)


def mix(omega: Tensor, parts: Tensor) -> Tensor:
    """Σ_j ω_j(x) parts_j for every row of the batch: (N, d). omega: (N, k), parts: (k, d) or (G, k, d)."""
    parts = parts.reshape(-1, *parts.shape[-2:])
    G = len(parts)
    return (omega.reshape(G, group_size(omega, G), -1) @ parts).flatten(0, 1)


def weigh(layer: Any, h: Tensor, w: Tensor) -> Tensor:
    """Thin features h of `down` times a number for every row and direction, w: (N, r)."""
    if isinstance(layer, nn.Linear):
        return h * w.reshape(len(h), *(1,) * (h.dim() - 2), -1)
    return (h.reshape(len(h), -1, w.shape[1], h[0, 0].numel()) * w[:, None, :, None]).reshape(h.shape)


class MixtureSARA(Adapter):
    """Mo-SARA: ω(x) = softmax(router x̄), x̄ the mean of the input over tokens or voxels; v_j: (r,), j = 1..k.

    B = U_r, A = V_rᵀ are W_0's leading singular vectors, frozen. v starts at zero, the router at N(0, 0.02²), so that
    the experts can part. k (r + c_in) numbers. Depends on x, so it cannot be merged. Gu et al. 2024; the start and the
    pooling are ours. In a windowed transformer every window is routed by its own mean.
    """

    factors = ("v", "router")
    merges = False
    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, rank: int = 8, experts: int = 4, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base)
        if min(rank, experts) < 1:
            raise FedloraError(f"rank and experts must be at least 1, got {rank} and {experts}")
        self.rank, self.experts = min(rank, *matrix_shape(base)), experts
        W = to_matrix(self.base, self.base.weight.detach())
        U, _, Vh = (t.to(W) for t in torch.linalg.svd(W.double(), full_matrices=False))
        self.register_buffer("A", Vh[: self.rank].contiguous())
        self.register_buffer("B", U[:, : self.rank].contiguous())
        self.v = nn.Parameter(torch.zeros(experts, self.rank).to(W))
        self.router = router_of(self.base, experts, generator)

    def path(self, x: Tensor) -> Tensor:
        v = mix(route(self.base, x, self.router), self.v)  # (N, r)
        return up(self.base, weigh(self.base, down(self.base, x, self.A), v), self.B)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "experts": self.experts}
