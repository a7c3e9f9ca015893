"""λ ||W||_* and λ (||W||_* - α ||W||_F) of a low-rank update W = s B diag(v) A, from its factors alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.names import moving, note_moving, together
from fedlora_mini.regularizers.proximal import l1_minus_l2, on_singular_values, product_svd, soft_threshold
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.state import State


def factors(state: State, path: str) -> tuple[Tensor, Tensor]:
    """B diag(v), or B where there is no v, and A: (m, r), (r, n)."""
    B, v = state[f"{path}.B"], state.get(f"{path}.v")
    return B if v is None else B * v, state[f"{path}.A"]


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """σ_i = u_iᵀ B A v_i with u_i and v_i held fixed: (k,), k = min(m, n, r).

    The values are exact, and so is the gradient of any smooth symmetric function of them whose slope is 0 at σ = 0,
    also where values coincide or are zero, where the backward passes of SVD and QR would divide by zero.
    """
    with torch.no_grad():
        U, _, Vh = product_svd(B, A)
    return ((U.mT @ B) * (A @ Vh.mT).mT).sum(1)


def smooth_nuclear(sigma: Tensor, eps: float) -> Tensor:
    """Σ_i sqrt(σ_i² + ε): between ||W||_* and ||W||_* + k sqrt(ε), differentiable."""
    return (sigma.square() + eps).sqrt().sum()


def smooth_frobenius(sigma: Tensor, eps: float) -> Tensor:
    """sqrt(Σ_i σ_i² + ε)."""
    return (sigma.square().sum() + eps).sqrt()


def each_spectrum(term: Regularizer, state: State, context: Context) -> list[Tensor]:
    """The singular values of every layer's W, differentiable."""
    found = layers(context, term.label, LoRA, Diagonal).items()
    return [abs(layer.scaling) * singular_values(*factors(state, path)) for path, layer in found]


def threshold_(
    term: Regularizer, state: State, context: Context, moves: frozenset[str], prox: Callable[[Tensor], Tensor]
) -> None:
    """W <- W's singular vectors with the values prox(σ), written back into the factors of every layer."""
    for path, layer in layers(context, term.label, LoRA, Diagonal).items():
        names = [name for name in (f"{path}.{role}" for role in ("A", "v", "B")) if name in state]
        B, A = factors(state, path)
        if together(term, names, moves) and bool(torch.isfinite(B).all() & torch.isfinite(A).all()):
            s = abs(layer.scaling)
            U, sigma, Vh = on_singular_values(B, A, lambda values, s=s: prox(s * values) / s)  # type: ignore[misc]
            write = _write_balanced if f"{path}.v" not in state else _write_diagonal
            write(state, path, _slots(B, A, U, Vh), U, sigma, Vh)


def _slots(B: Tensor, A: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """For each kept singular pair its own rank direction, such that Σ (u_j · b_i)(a_i · v_j) is largest: (k,)."""
    share = (U.mT @ B) * (A @ Vh.mT).mT  # (k, r): direction i's part in σ_j
    return torch.as_tensor(linear_sum_assignment(share.cpu().numpy(), maximize=True)[1], device=B.device)


def _write_balanced(state: State, path: str, slots: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor) -> None:
    """B = U sqrt(Σ) R, A = Rᵀ sqrt(Σ) Vᵀ in the slots, so that BᵀB = AAᵀ; b_i = 0 elsewhere, and a_i as it was.

    R is the rotation that brings them nearest to the old B and A: momentum keeps its meaning. A direction with b_i = 0
    has a gradient through a_i, as at LoRA's start, and can come back.
    """
    A, B, root = state[f"{path}.A"], state[f"{path}.B"], sigma.sqrt()
    u, _, vh = torch.linalg.svd(root[:, None] * (U.mT @ B[:, slots] + Vh @ A[slots].mT))
    R = u @ vh
    B.zero_()
    B[:, slots] = (U * root) @ R
    A[slots] = R.mT @ (root[:, None] * Vh)


def _write_diagonal(state: State, path: str, slots: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor) -> None:
    """b_i = ±u_j, v_i = ±σ_j, a_i = ±v_j in the slots, signs as they were; elsewhere v_i = 0 and the rest as it was."""
    A, v, B = (state[f"{path}.{role}"] for role in ("A", "v", "B"))
    left = torch.where((U * B[:, slots]).sum(0) < 0, -1.0, 1.0).to(B)
    right = torch.where((Vh * A[slots]).sum(1) < 0, -1.0, 1.0).to(A)
    B[:, slots], A[slots] = U * left, Vh * right[:, None]
    v.zero_()
    v[slots] = left * right * sigma


FORMS = ("proximal", "smooth", "variational")


@dataclass(frozen=True)
class NuclearNorm(Regularizer):
    """λ Σ_i σ_i(W), summed over layers; no m x n matrix is formed.

    form:
    - "proximal": after the optimiser's step W's singular values are lowered by lr λ, by QR of the factors and an SVD of
      the r x r core (Cai, Candès and Shen 2010). What is cut is exactly zero in B (in v, if there is one). It is the
      prox of W, but the step before it was one of the factors, which moves σ_i at 2 s σ_i times the rate of W's own
      gradient: under SGD σ_i comes to rest λ / (2 s σ_i) below the optimum, or at zero. That spares large values more
      than the nuclear norm does. Adam's step does not grow with the gradient, so there λ acts weaker still.
    - "smooth": λ Σ_i sqrt(σ_i² + ε) in the loss, which lowers every σ_i by λ but never to exact zeros.
    - "variational": λ (s/2) Σ_i |v_i| (||b_i||² + ||a_i||²) in the loss, an upper bound that is tight where the
      directions are orthogonal and balanced; the same end, and without v it is weight decay on A and B.
    """

    lam: float = 1e-3
    form: str = "proximal"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of NuclearNorm", self.form, FORMS)

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"nuclear norm ({self.form}), lambda {self.lam:g}"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        if self.form == "smooth":
            return self.lam * sum(smooth_nuclear(sigma, self.eps) for sigma in each_spectrum(self, state, context))
        if self.form == "variational":
            found = layers(context, self.label, LoRA, Diagonal).items()
            return self.lam * sum(_half_squares(state, path, layer) for path, layer in found)
        return 0.0

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        note_moving(self, gradient, context)

    def prox_(self, state: State, context: Context) -> None:
        moves = moving(self, context)
        if self.form == "proximal":
            threshold_(self, state, context, moves, partial(soft_threshold, tau=context.lr * self.lam))


def _half_squares(state: State, path: str, layer: Any) -> Tensor:
    A, B, v = state[f"{path}.A"], state[f"{path}.B"], state.get(f"{path}.v")
    squares = B.square().sum(0) + A.square().sum(1)  # (r,)
    return 0.5 * abs(layer.scaling) * (squares if v is None else v.abs() * squares).sum()


@dataclass(frozen=True)
class NuclearFrobenius(Regularizer):
    """λ (||W||_* - α ||W||_F + ½ ridge ||W||_F²), summed over layers.

    "Nuclear-Frobenius" names two opposite things; both are here, told apart by their signs:

    - the DIFFERENCE, 0 < α <= 1 (default α = 1): a non-convex surrogate of the rank, nearer to it than the nuclear norm
      since it does not shrink what it keeps as much. It is zero on matrices of rank one, so with α = 1 the largest
      direction is never cut. Ma, Lou and Huang 2017.
    - the SUM: α < 0 adds |α| ||W||_F, which also pulls W as a whole to zero; `ridge` adds the square instead, and with
      α = 0 that is the elastic net of the singular values. Both are convex.

    α = ridge = 0 is NuclearNorm. form "proximal" applies the closed form of `proximal.l1_minus_l2` to the
    singular values, with NuclearNorm's caveats; "smooth" replaces σ_i by sqrt(σ_i² + ε) and ||W||_F by
    sqrt(||W||_F² + ε) in the loss.
    """

    lam: float = 1e-3
    alpha: float = 1.0
    ridge: float = 0.0
    form: str = "proximal"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.form not in FORMS[:2]:
            raise unknown("form of NuclearFrobenius", self.form, FORMS[:2])
        if self.alpha > 1:
            raise FedloraError(f"alpha must be at most 1, got {self.alpha}: beyond it the penalty is negative")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"nuclear-Frobenius norm ({self.form}), lambda {self.lam:g}, alpha {self.alpha:g}, ridge {self.ridge:g}"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        if self.form != "smooth":
            return 0.0
        total: Tensor | float = 0.0
        for sigma in each_spectrum(self, state, context):
            norms = smooth_nuclear(sigma, self.eps) - self.alpha * smooth_frobenius(sigma, self.eps)
            total = total + norms + 0.5 * self.ridge * sigma.square().sum()
        return self.lam * total

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        note_moving(self, gradient, context)

    def prox_(self, state: State, context: Context) -> None:
        moves, tau = moving(self, context), context.lr * self.lam
        if self.form == "proximal":
            prox = partial(l1_minus_l2, tau=tau, alpha=self.alpha, ridge=self.ridge)
            threshold_(self, state, context, moves, prox)
