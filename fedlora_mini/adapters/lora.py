"""ΔW = s B A with s = alpha / r (or alpha / sqrt(r)): low-rank adaptation."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.ops import lowrank, matrix_shape, to_weight
from fedlora_mini.errors import FedloraError


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(n), 1/sqrt(n)), n the last dimension: Kaiming-uniform with a = sqrt(5), LoRA's start for A."""
    bound = 1 / math.sqrt(shape[-1])
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


class LowRank(Adapter):
    """ΔW = P Q. Subclasses say what the thin pair is."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """P: (m, r) and Q: (r, n), or with a group axis."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        P, Q = self.pair()
        return to_weight(self.base, P @ Q)

    def path(self, x: Tensor) -> Tensor:
        P, Q = self.pair()
        return lowrank(self.base, x, Q, P)


class LoRA(LowRank):
    """ΔW = s B A, A: (r, n) Kaiming-uniform, B: (m, r) zero, s = alpha / r.

    (m, n) is the layer's weight as a matrix: for a convolution n = c_in / groups * kernel volume, so A holds the kernel
    and B is pointwise. `rslora=True` uses s = alpha / sqrt(r). `alpha=None` means alpha = r, that is s = 1.
    Hu et al. 2022; Kalajdzievski 2023 for the square root.
    """

    factors: tuple[str, ...] = ("A", "B")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        alpha: float | None = None,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise FedloraError(f"rank must be at least 1, got {rank}")
        m, n = matrix_shape(base)
        like = {"dtype": self.base.weight.dtype, "device": self.base.weight.device}
        self.rank, self.alpha, self.rslora = rank, float(rank if alpha is None else alpha), rslora
        self.scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.A = nn.Parameter(kaiming_uniform((rank, n), generator or torch.default_generator).to(**like))
        self.B = nn.Parameter(torch.zeros(m, rank, **like))

    def pair(self) -> tuple[Tensor, Tensor]:
        """P = s B, Q = A."""
        return (self.B if self.scaling == 1 else self.scaling * self.B), self.A

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "rslora": self.rslora}
