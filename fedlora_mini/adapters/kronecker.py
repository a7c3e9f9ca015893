"""ΔW = Σ_i S_i ⊗ (D_i U_i): low-rank experts for a block of channels, spread over all blocks by a small matrix each."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.adapters.ops import down, linear, matrix_shape, to_weight, up
from fedlora_mini.errors import FedloraError


class ALoRE(Adapter):
    """ΔW = Σ_{i=1}^k S_i ⊗ (D_i U_i); S_i: (k, k), D_i: (m/k, r), U_i: (r, n/k). k³ + r (m + n) numbers.

    Block a of the outputs gets Σ_i S_i[a, b] D_i U_i x_b from block b of the inputs: rank up to k² r for the numbers of
    rank r. On a convolution the blocks are of channels and U_i holds the whole kernel; its g groups are layers of
    their own with U and S in common and rows of D each. k is the largest divisor of m/g and c_in/g up to `blocks`: for
    three input channels and 16 outputs k = 1, which is LoRA times a number.
    Linear in x, merged after training. Du et al. 2024; beside the layer instead of in sequence with it, and the start
    (D = 0, U and S Kaiming-uniform by their last axis) are reconstruction.
    """

    factors = ("S", "U", "D")

    def __init__(
        self, base: nn.Module, rank: int = 4, blocks: int = 4, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base)
        if min(rank, blocks) < 1:
            raise FedloraError(f"rank and blocks must be at least 1, got {rank} and {blocks}")
        (m, n), W = matrix_shape(base), self.base.weight
        self.rank, self.blocks, self.groups = rank, blocks, getattr(base, "groups", 1)
        c = self.base.in_features if isinstance(base, nn.Linear) else self.base.in_channels
        common = math.gcd(m, c) // self.groups
        self.k = k = max(i for i in range(1, min(blocks, common) + 1) if common % i == 0)
        rng = generator or torch.default_generator
        self.S = nn.Parameter(kaiming_uniform((k, k, k), rng).to(W))
        self.U = nn.Parameter(kaiming_uniform((k, rank, n // k), rng).to(W))
        self.D = nn.Parameter(W.new_zeros(k, m // k, rank))

    def _up(self) -> Tensor:
        """D by group of channels, (G, g, p, k r) with p = m / (g k): row i r of a block belongs to expert i."""
        D = self.D.reshape(-1, self.k, self.groups, self.D.shape[-2] // self.groups, self.rank)  # (G, i, g, p, r)
        return D.permute(0, 2, 3, 1, 4).flatten(3)

    def delta(self) -> Tensor:
        k, r = self.k, self.rank
        S, U = self.S.reshape(-1, k, k, k), self.U.reshape(-1, k, r, self.U.shape[-1])
        D = self._up().unflatten(3, (k, r))
        M = torch.einsum("Giab,Gjpir,Girq->Gjapbq", S, D, U)
        M = M.reshape(len(M), *matrix_shape(self.base))
        return to_weight(self.base, M if max(self.S.dim(), self.U.dim(), self.D.dim()) == 4 else M[0])

    def mix(self, h: Tensor) -> Tensor:
        """z_{a,i} = Σ_b S_i[a, b] h_{b,i}. h: (N, …, b, i r) or, for a convolution, (N, g b i r, *S')."""
        k, voxels = self.k, 1 if isinstance(self.base, nn.Linear) else h[0, 0].numel()
        S = self.S.reshape(-1, k, k, k)
        z = torch.einsum("Giab,Gsbirl->Gsairl", S, h.reshape(len(S), -1, k, k, self.rank, voxels))
        return z.reshape(h.shape)

    def path(self, x: Tensor) -> Tensor:
        k = self.k
        U, D = self.U.reshape(-1, k * self.rank, self.U.shape[-1]), self._up()
        if isinstance(self.base, nn.Linear):
            h = linear(x.unflatten(-1, (k, -1)), U)  # (N, …, b, i r)
            return linear(self.mix(h), D[:, 0]).flatten(-2)
        split = copy.copy(self.base)  # the same operation on k times as many groups of channels
        split.groups = self.groups * k
        D = D.unsqueeze(2).expand(-1, -1, k, -1, -1).reshape(len(D), -1, D.shape[-1])  # (G, m, i r)
        return up(split, self.mix(down(split, x, U)), D)  # (N, g b i r, *S') in between

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "blocks": self.blocks}
