"""ΔW(x) = B diag(Σ_j ω_j(x) v_j) A: a router mixes several vectors of singular values, all else is frozen."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.ops import down, group_size, matrix_shape, to_matrix, up
from fedlora_mini.errors import FedloraError


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
        c = self.base.in_features if isinstance(self.base, nn.Linear) else self.base.in_channels
        router = 0.02 * torch.randn(experts, c, generator=generator or torch.default_generator)
        self.v = nn.Parameter(torch.zeros(experts, self.rank).to(W))
        self.router = nn.Parameter(router.to(W))

    def mixed(self, x: Tensor) -> Tensor:
        """Σ_j ω_j(x) v_j for every row of the batch: (N, r)."""
        linear = isinstance(self.base, nn.Linear)
        mean = x.flatten(1, -2).mean(1) if linear and x.dim() > 2 else x if linear else x.flatten(2).mean(2)  # (N, c)
        v, router = (t.reshape(-1, *t.shape[-2:]) for t in (self.v, self.router))  # (G, k, r), (G, k, c)
        G = max(len(v), len(router))  # either may be common to all groups
        omega = (mean.reshape(G, group_size(x, G), -1) @ router.mT).softmax(-1)  # (G, N/G, k)
        return (omega @ v).reshape(x.shape[0], -1)

    def path(self, x: Tensor) -> Tensor:
        h, weight = down(self.base, x, self.A), self.mixed(x)
        if isinstance(self.base, nn.Linear):
            h = h * weight.reshape(len(x), *(1,) * (x.dim() - 2), self.rank)
        else:
            h = (h.reshape(len(x), -1, self.rank, h[0, 0].numel()) * weight[:, None, :, None]).reshape(h.shape)
        return up(self.base, h, self.B)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "experts": self.experts}
