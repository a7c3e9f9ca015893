"""ΔW = s (B A + B_own A_own): a branch that a federation shares beside one that stays at the client."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.lora import LowRank, kaiming_uniform
from fedlora_mini.adapters.ops import matrix_shape
from fedlora_mini.errors import FedloraError


def beside(P: Tensor, Q: Tensor, dim: int) -> Tensor:
    """Two thin factors as one, joined along `dim` (-1 or -2); a group axis that only one of them has goes to both."""
    lead = torch.broadcast_shapes(P.shape[:-2], Q.shape[:-2])
    return torch.cat([t.expand(*lead, *t.shape[-2:]) for t in (P, Q)], dim)


class Dual(LowRank):
    """ΔW = s (B A + B_own A_own), s = alpha / r; A: (r, n), B: (m, r), A_own: (r_own, n), B_own: (m, r_own).

    A and A_own are drawn apart, or with `alike` are one draw, so that both branches start to learn the same; B and
    B_own are zero. One thin product of rank r + r_own, (r + r_own)(m + n) numbers.
    rank_own=None: r_own = r. The branches of the client-tailored adapter (Hu et al. 2025; the split is reconstruction)
    and, with `Fused`, of FDLoRA.
    """

    factors: tuple[str, ...] = ("A", "B", "A_own", "B_own")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        rank_own: int | None = None,
        alpha: float | None = None,
        alike: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        own = rank if rank_own is None else rank_own
        if min(rank, own) < 1:
            raise FedloraError(f"rank and rank_own must be at least 1, got {rank} and {own}")
        if alike and own != rank:
            raise FedloraError(f"branches that start alike have one rank, not {rank} and {own}")
        (m, n), W, rng = matrix_shape(base), self.base.weight, generator or torch.default_generator
        self.alike, self.rank, self.rank_own, self.alpha = alike, rank, own, float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank
        self.A = nn.Parameter(kaiming_uniform((rank, n), rng).to(W))
        self.B = nn.Parameter(W.new_zeros(m, rank))
        self.A_own = nn.Parameter(self.A.detach().clone() if alike else kaiming_uniform((own, n), rng).to(W))
        self.B_own = nn.Parameter(W.new_zeros(m, own))

    def pair(self) -> tuple[Tensor, Tensor]:
        """P = s [B, B_own], Q = [A; A_own]."""
        return self.scaling * beside(self.B, self.B_own, -1), beside(self.A, self.A_own, -2)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "rank_own": self.rank_own, "alpha": self.alpha, "alike": self.alike}


class Fused(Dual):
    """ΔW = s (w B A + w_own B_own A_own); mix = (w, w_own) is found by a search without gradients, and starts at 1.

    With w_own = 0 the shared branch trains alone, with w = 0 the client's. Qi et al. 2024 (FDLoRA) have one pair of
    numbers for all layers; here every layer holds its copy.
    """

    factors = (*Dual.factors, "mix")
    still = ("mix",)

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        rank_own: int | None = None,
        alpha: float | None = None,
        alike: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, rank_own, alpha, alike, generator)
        self.mix = nn.Parameter(self.base.weight.new_ones(2), requires_grad=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        """P = s [w B, w_own B_own], Q = [A; A_own]."""
        w, w_own = self.mix[..., :1, None], self.mix[..., 1:, None]  # (…, 1, 1)
        return self.scaling * beside(w * self.B, w_own * self.B_own, -1), beside(self.A, self.A_own, -2)
