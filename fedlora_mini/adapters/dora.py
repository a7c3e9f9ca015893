"""W = c ⊙ (W_0 + s B A), c = magnitude / norm of each output's row: direction and magnitude trained apart."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import add_bias, lowrank, matrix_shape, rescale, to_matrix, to_weight
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


class Magnitude(Adapter):
    """y = c ⊙ (W_0 x + P Q x) + b with c_i = g_i / ||(W_0 + P Q)_i||, i an output; g starts at ||(W_0)_i||.

    Subclasses give the thin pair P (m, r), Q (r, n) by `pair`. The norm of a row comes from P, Q and Q W_0ᵀ, so the
    product is never formed. `detach` treats the norm as a constant in the gradient, as the authors of DoRA do. The norm
    is taken over a layer's inputs, one number per output, as published implementations do; on a convolution over the
    kernel too.
    """

    base: Any
    g: Tensor
    detach: bool

    def pair(self) -> tuple[Tensor, Tensor]:
        """P: (m, r), Q: (r, n), or with a group axis."""
        raise NotImplementedError

    def row_norms(self, P: Tensor, Q: Tensor) -> Tensor:
        """||w_i + p_i Q||: sqrt(||w_i||² + 2 p_i·(Q w_i) + p_i Q Qᵀ p_iᵀ). (m,) or (G, m)."""
        W = to_matrix(self.base, self.frozen()).detach()
        cross = (P * (Q @ W.T).mT).sum(-1)  # (m,)
        own = (P @ (Q @ Q.mT) * P).sum(-1)
        squares = torch.linalg.vector_norm(W, dim=-1).square() + 2 * cross + own
        zero = squares <= 0
        return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)  # the root has no gradient at zero

    def ratio(self, P: Tensor, Q: Tensor) -> Tensor:
        """c: (m,) or (G, m). A row of zeros has no direction: c = 0, whatever g is."""
        norm = self.row_norms(P, Q)
        norm = norm.detach() if self.detach else norm
        return self.g / norm.masked_fill(norm == 0, torch.inf)

    def adapted(self, x: Tensor) -> Tensor:
        P, Q = self.pair()
        c = self.ratio(P, Q)
        y = rescale(self.base, self.base(x) + lowrank(self.base, x, Q, P), c)
        return y if self.base.bias is None else add_bias(self.base, y, (1 - c) * self.base.bias)

    def folded(self) -> State:
        P, Q = self.pair()
        W = to_matrix(self.base, self.frozen()) + P @ Q
        return {"weight": to_weight(self.base, self.ratio(P, Q).unsqueeze(-1) * W)}

    def delta(self) -> Tensor:
        return self.folded()["weight"] - self.frozen()


class DoRA(Magnitude, LoRA):
    """P = s B, Q = A as in LoRA, and a magnitude g: r (m + n) + m numbers. Liu et al. 2024."""

    factors = ("A", "B", "g")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        alpha: float | None = None,
        detach: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        LoRA.__init__(self, base, rank, alpha, generator=generator)
        self.detach = detach
        with torch.no_grad():
            self.g = nn.Parameter(self.row_norms(*self.pair()))

    def pair(self) -> tuple[Tensor, Tensor]:
        return LoRA.pair(self)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "detach": self.detach}


class EDoRA(Magnitude):
    """P = s B R, Q = A with B A the truncated SVD of W_0, both frozen; only R (r, r) and g train: r² + m numbers.

    B = U_r Σ_r, A = V_rᵀ. R ~ N(0, (1e-5)²), so the start is the base up to 1e-5. Nasiri and Garraghan 2025.
    """

    factors = ("R", "g")
    starts_at_base = False
    A: Tensor
    B: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        detach: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise FedloraError(f"rank must be at least 1, got {rank}")
        self.rank, self.detach = min(rank, *matrix_shape(base)), detach
        self.alpha = float(self.rank if alpha is None else alpha)
        self.scaling = self.alpha / self.rank
        W = to_matrix(self.base, self.base.weight.detach())
        U, sigma, Vh = (t.to(W) for t in torch.linalg.svd(W.double(), full_matrices=False))
        self.register_buffer("A", Vh[: self.rank].contiguous())
        self.register_buffer("B", (U * sigma)[:, : self.rank].contiguous())
        R = 1e-5 * torch.randn(self.rank, self.rank, generator=generator or torch.default_generator)
        self.R = nn.Parameter(R.to(W))
        with torch.no_grad():
            self.g = nn.Parameter(W.square().sum(-1).sqrt())

    def pair(self) -> tuple[Tensor, Tensor]:
        P = self.scaling * self.B @ self.R
        return P, self.A.expand(*P.shape[:-2], *self.A.shape)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "detach": self.detach}
