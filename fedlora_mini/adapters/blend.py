"""ΔW = (1 - μ) D_own + μ s B A: a client's own full change of the layer, mixed with a small common adapter."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.adapters.ops import lowrank, matrix_shape, operate, to_weight
from fedlora_mini.errors import FedloraError


class Blend(Adapter):
    """ΔW = (1 - μ) D_own + μ s B A, s = alpha / r; D_own: weight.shape, A: (r, n), B: (m, r); D_own = B = 0 at first.

    m n + r (m + n) numbers, of which a federation shares r (m + n). pFedLoRA (Yi et al. 2023) mixes the representations
    of two networks, the clients' own of which may differ in architecture; in one network that is a mixture of two
    changes of every layer, and linear in x, so it merges. 0 <= μ <= 1; at an end only one of them does anything.
    """

    factors = ("A", "B", "D_own")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        mu: float = 0.5,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise FedloraError(f"rank must be at least 1, got {rank}")
        if not 0 <= mu <= 1:
            raise FedloraError(f"mu must be between 0 and 1, got {mu}")
        (m, n), W = matrix_shape(base), self.base.weight
        self.rank, self.mu, self.alpha = rank, mu, float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank
        self.A = nn.Parameter(kaiming_uniform((rank, n), generator or torch.default_generator).to(W))
        self.B = nn.Parameter(W.new_zeros(m, rank))
        self.D_own = nn.Parameter(torch.zeros_like(W))

    def delta(self) -> Tensor:
        return (1 - self.mu) * self.D_own + self.mu * self.scaling * to_weight(self.base, self.B @ self.A)

    def path(self, x: Tensor) -> Tensor:
        common = lowrank(self.base, x, self.A, self.mu * self.scaling * self.B)
        return common + (1 - self.mu) * operate(self.base, x, self.D_own)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "mu": self.mu, "alpha": self.alpha}
