"""λ ||W||_* and λ (||W||_* - α ||W||_F) of a low-rank update W = s B diag(v) A, without any m x n matrix."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.proximal import l1_minus_l2, soft_threshold
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.regularizers.spectrum import each_spectrum, threshold_
from fedlora_mini.state import State


def smooth_nuclear(sigma: Tensor, eps: float) -> Tensor:
    """Σ_i sqrt(σ_i² + ε): between ||W||_* and ||W||_* + k sqrt(ε), differentiable."""
    return (sigma.square() + eps).sqrt().sum()


def smooth_frobenius(sigma: Tensor, eps: float) -> Tensor:
    """sqrt(Σ_i σ_i² + ε)."""
    return (sigma.square().sum() + eps).sqrt()


FORMS = ("proximal", "smooth", "variational")


@dataclass(frozen=True)
class NuclearNorm(Regularizer):
    """λ Σ_i σ_i(W), summed over layers; no m x n matrix is formed.

    form:
    - "proximal": after the optimiser's step W's singular values are lowered by lr λ, by QR of the factors and an SVD of
      the r x r core (Cai, Candès and Shen 2010). What is cut is exactly zero in B (in v, if there is one). It is the
      prox of W, but the step before it was one of the factors, which under SGD moves σ_i by 2 s σ_i times what a step
      of W would (without v). So σ_i rests where the loss has slope λ / (2 s σ_i) instead of λ, or at zero: large values
      are spared more than by the nuclear norm. Adam's step does not shrink with the gradient; there λ is weaker still.
    - "smooth": λ Σ_i sqrt(σ_i² + ε) in the loss: slope λ for all σ_i, and no exact zeros.
    - "variational": λ (s/2) Σ_i |v_i| (||b_i||² + ||a_i||²) in the loss, an upper bound that is tight where the
      directions are orthogonal and balanced; without v it is weight decay on A and B.
    """

    lam: float = 1e-3
    form: str = "proximal"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of NuclearNorm", self.form, FORMS)
        ranges(self, lam="[0, inf)", eps="(0, inf)")

    free = True

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

    def prox_(self, state: State, context: Context) -> None:
        moves = context.moves
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
        ranges(self, lam="[0, inf)", ridge="[0, inf)", eps="(0, inf)")

    free = True

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

    def prox_(self, state: State, context: Context) -> None:
        moves, tau = context.moves, context.lr * self.lam
        if self.form == "proximal":
            prox = partial(l1_minus_l2, tau=tau, alpha=self.alpha, ridge=self.ridge)
            threshold_(self, state, context, moves, prox)
