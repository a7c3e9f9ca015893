"""ΔW(x) = s Σ_i ω_i(x) B_i A_i: a router mixes low-rank branches, some of them a federation's, some a client's own."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.dual import beside
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.adapters.mixture import inputs, mix, route, router_of, weigh
from fedlora_mini.adapters.ops import down, matrix_shape, up
from fedlora_mini.errors import FedloraError


class Hydra(Adapter):
    """y = W_0 x + s Σ_i ω_i(x) B_i A x; ω(x) = softmax(router x̄), A: (r, n), B: (k, m, r), router: (k, c_in).

    One A for all experts, B = 0 at the start, so that only the router's small numbers tell them apart.
    r n + k (r m + c_in) numbers; depends on x, so it cannot be merged. HydraLoRA (Tian et al. 2024) routes every token;
    x̄, the mean over tokens or voxels, is ours, and so is what a federation shares of it.
    """

    factors = ("A", "B", "router")
    merges = False

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        experts: int = 4,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        if min(rank, experts) < 1:
            raise FedloraError(f"rank and experts must be at least 1, got {rank} and {experts}")
        (m, n), W, rng = matrix_shape(base), self.base.weight, generator or torch.default_generator
        self.rank, self.experts, self.alpha = rank, experts, float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank
        self.A = nn.Parameter(kaiming_uniform((rank, n), rng).to(W))
        self.B = nn.Parameter(W.new_zeros(experts, m, rank))
        self.router = router_of(self.base, experts, rng)

    def path(self, x: Tensor) -> Tensor:
        """B(x) A x with B(x) = s Σ_i ω_i(x) B_i: (N, m, r), one for every row of the batch."""
        B = mix(route(self.base, x, self.router), self.scaling * self.B.flatten(-2))  # (N, m r)
        return up(self.base, down(self.base, x, self.A), B.unflatten(-1, self.B.shape[-2:]))

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "experts": self.experts, "alpha": self.alpha}


class WithRest(Adapter):
    """y = W_0 x + s [ω_1(x) B A x + ω_2(x) B_rest A_rest x]; ω(x) = softmax(router x̄), router: (2, c_in).

    B A is what the client trains and sends, B_rest A_rest what it receives, made of the other clients' pairs, and
    never trains. B_rest = A_rest = 0 until something has come. The router starts at zero, ω = (1/2, 1/2); since B = 0
    too, the layer is the base all the same. r (m + n) + 2 c_in trained numbers. FedALT, Bian et al. 2026; x̄ is ours.
    """

    factors = ("A", "B", "A_rest", "B_rest", "router")
    still = ("A_rest", "B_rest")
    merges = False

    def __init__(
        self, base: nn.Module, rank: int = 4, alpha: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise FedloraError(f"rank must be at least 1, got {rank}")
        (m, n), W = matrix_shape(base), self.base.weight
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank
        self.A = nn.Parameter(kaiming_uniform((rank, n), generator or torch.default_generator).to(W))
        self.B = nn.Parameter(W.new_zeros(m, rank))
        self.A_rest = nn.Parameter(W.new_zeros(rank, n), requires_grad=False)
        self.B_rest = nn.Parameter(W.new_zeros(m, rank), requires_grad=False)
        self.router = nn.Parameter(W.new_zeros(2, inputs(base)))

    def path(self, x: Tensor) -> Tensor:
        w = route(self.base, x, self.router).repeat_interleave(self.rank, -1)  # (N, 2 r)
        h = down(self.base, x, beside(self.A, self.A_rest, -2))
        return up(self.base, weigh(self.base, h, w), self.scaling * beside(self.B, self.B_rest, -1))

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}


class Experts(Adapter):
    """y = W_0 x + s B A x + s Σ_i ω_i(x) B_own,i A_own,i x; ω(x) = softmax(router x̄), router: (k, c_in).

    A shared LoRA, A: (r, n), B: (m, r), beside a client's own mixture, A_own: (k, r_own, n), B_own: (k, m, r_own).
    Every A_own,i is drawn apart, B and B_own are zero. (r + k r_own)(m + n) + k c_in numbers. rank_own=None: r_own = r.
    The localised mixture of experts of pFedSAM, Wang et al. 2025; its low-rank form, router and x̄ are reconstruction.
    """

    factors = ("A", "B", "A_own", "B_own", "router")
    merges = False

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        experts: int = 4,
        rank_own: int | None = None,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        own = rank if rank_own is None else rank_own
        if min(rank, experts, own) < 1:
            raise FedloraError(f"rank, experts and rank_own must be at least 1, got {rank}, {experts} and {own}")
        (m, n), W, rng = matrix_shape(base), self.base.weight, generator or torch.default_generator
        self.rank, self.experts, self.rank_own = rank, experts, own
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank
        self.A = nn.Parameter(kaiming_uniform((rank, n), rng).to(W))
        self.B = nn.Parameter(W.new_zeros(m, rank))
        self.A_own = nn.Parameter(kaiming_uniform((experts, own, n), rng).to(W))
        self.B_own = nn.Parameter(W.new_zeros(experts, m, own))
        self.router = router_of(self.base, experts, rng)

    def path(self, x: Tensor) -> Tensor:
        """The experts stand one after the other in one thin pair, behind the shared one, whose weight is 1."""
        A_own, B_own = (
            self.A_own.flatten(-3, -2),
            self.B_own.transpose(-3, -2).flatten(-2),
        )  # (k r_own, n), (m, k r_own)
        omega = route(self.base, x, self.router).repeat_interleave(self.rank_own, -1)  # (N, k r_own)
        w = torch.cat([omega.new_ones(len(omega), self.rank), omega], -1)
        h = weigh(self.base, down(self.base, x, beside(self.A, A_own, -2)), w)
        return up(self.base, h, self.scaling * beside(self.B, B_own, -1))

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "experts": self.experts, "rank_own": self.rank_own, "alpha": self.alpha}
