"""ΔW = s B diag(v) A: low rank with a number per direction. An entry of v that is zero is a direction that is gone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import adapters, place
from fedlora_mini.adapters.lora import LowRank, kaiming_uniform
from fedlora_mini.adapters.ops import matrix_shape
from fedlora_mini.errors import FedloraError, unknown

Start = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""(m, n, r, generator) -> A (r, n), v (r,), B (m, r)."""


def from_lora(m: int, n: int, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A Kaiming-uniform, v = 1, B = 0: LoRA's start. The gradient of v is zero until B has moved."""
    return kaiming_uniform((r, n), rng), torch.ones(r), torch.zeros(m, r)


def from_gate(m: int, n: int, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same with v ~ N(0, 1): SoRA's code."""
    A = kaiming_uniform((r, n), rng)
    return A, torch.randn(r, generator=rng), torch.zeros(m, r)


def from_small(m: int, n: int, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A, B ~ N(0, 0.02²), v = 0: AdaLoRA's code."""
    return 0.02 * torch.randn(r, n, generator=rng), torch.zeros(r), 0.02 * torch.randn(m, r, generator=rng)


def from_unit(m: int, n: int, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of A and columns of B random with unit norm, v = 0: then v is the size of a direction."""
    A, B = torch.randn(r, n, generator=rng), torch.randn(m, r, generator=rng)
    return A / A.norm(dim=1, keepdim=True), torch.zeros(r), B / B.norm(dim=0)


STARTS: dict[str, Start] = {"lora": from_lora, "gate": from_gate, "small": from_small, "unit": from_unit}


class Diagonal(LowRank):
    """ΔW = s B diag(v) A; A: (r, n), v: (r,), B: (m, r); r + r (m + n) numbers; rank = ||v||_0.

    ARENA (Baklouti et al. 2025, chapter 5) trains v by proximal steps of the l1 norm, SoRA (Ding et al. 2023)
    by Adam with a threshold, AdaLoRA (Zhang et al. 2023) under a budget; what they do to v stands in `regularizers`.
    start: a row of STARTS. alpha=None: s = 1.
    """

    factors = ("A", "v", "B")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        start: str = "lora",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise FedloraError(f"rank must be at least 1, got {rank}")
        if start not in STARTS:
            raise unknown("start", start, STARTS)
        like = {"dtype": self.base.weight.dtype, "device": self.base.weight.device}
        self.rank, self.alpha, self.start = rank, float(rank if alpha is None else alpha), start
        self.scaling = self.alpha / rank
        A, v, B = STARTS[start](*matrix_shape(base), rank, generator or torch.default_generator)
        self.A, self.v, self.B = (nn.Parameter(t.to(**like)) for t in (A, v, B))

    def pair(self) -> tuple[Tensor, Tensor]:
        """P = s B diag(v), Q = A."""
        return self.B * (self.v if self.scaling == 1 else self.scaling * self.v).unsqueeze(-2), self.A

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "start": self.start}


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    """Drop every direction with v_i = 0, in place: the same output from fewer numbers. A layer left with none is bare.

    s stays what it was: alpha shrinks with the rank.
    """
    for path, adapter in list(adapters(model)):
        if not isinstance(adapter, Diagonal):
            continue
        if adapter.merged:
            raise FedloraError(f"the adapter at '{path}' is merged; call unmerge(model) before pruning")
        kept = adapter.v != 0
        r = int(kept.sum())
        if r == 0:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, adapter.base)
        elif r < adapter.rank:
            smaller = Diagonal(adapter.base, r, adapter.scaling * r, adapter.start, torch.Generator())
            smaller.A, smaller.v, smaller.B = (
                nn.Parameter(t.clone()) for t in (adapter.A[kept], adapter.v[kept], adapter.B[:, kept])
            )
            place(model, path, smaller)
    return model
