"""λ ||v||_1 by proximal steps (ARENA, SoRA), and λ Σ_i ||(b_i, a_i)||, the group lasso on rank directions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.names import named, together
from fedlora_mini.regularizers.proximal import group_soft_threshold, weighted_soft_threshold
from fedlora_mini.regularizers.scope import clock, layers
from fedlora_mini.state import State

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's usual constants
CHOICES = {
    "step": ("sgd", "adam"),
    "metric": ("euclidean", "adam"),
    "threshold": ("scaled", "plain"),
    "order": ("simultaneous", "gauss_seidel"),
    "gauge": (None, "unit"),
}


class _Moments:
    """Adam's averages m of g and u of g², corrected for their start at zero."""

    def __init__(self) -> None:
        self.t, self.m, self.u = 0, torch.tensor(0.0), torch.tensor(0.0)

    def __call__(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """(m̂, sqrt(û) + ε): the direction is their quotient, the second is the metric's diagonal."""
        self.t += 1
        self.m = BETA1 * self.m.to(g) + (1 - BETA1) * g
        self.u = BETA2 * self.u.to(g) + (1 - BETA2) * g.square()
        return self.m / (1 - BETA1**self.t), (self.u / (1 - BETA2**self.t)).sqrt() + EPS


@dataclass(frozen=True)
class L1(Regularizer):
    """v <- ξ(v - ρ ∇_v L, η λ), ξ(x, τ) = sign(x) max(|x| - τ, 0): rank = ||v||_0, and zero means 0.0.

    Takes the gradient of v away from the optimiser and makes this step after it. A zeroed direction comes back when
    |ρ ∇_v L| > η λ. chapter 5; the defaults are its choices where ARENA's sources leave them open:

    - rho: None is the step's own rate; a number follows the same warm-up and schedule.
    - eta: None is ρ, which makes it proximal gradient descent on L + λ ||v||_1; the source has distinct symbols.
    - threshold: "scaled" is η λ, "plain" is λ itself at every step (the first of SoRA's two optimisers).
    - step: "sgd", or "adam" with moments of its own. Then metric "euclidean" thresholds Adam's step by η λ, as SoRA
      does, which is the proximal step of no metric; "adam" is the exact one in the metric diag(sqrt(û) + ε) in which
      Adam descends: threshold η λ / (sqrt(û_i) + ε).
    - order: "simultaneous" uses the gradient at (A, B, v)_t; "gauss_seidel" takes it again after A and B have moved.
    - weight: SoRA's code also adds weight * mean |v_i| over all gates to the loss.
    - ramp: (λ at the end, steps until then, counted through the rounds): λ grows linearly from `lam`.
    - gauge: "unit" scales rows of A and columns of B to norm one after the step and v by what they had, so that W
      stays. Without it, and without decay of A and B, λ is vacuous: (c B, v / c, A) is the same W with a smaller
      ||v||_1. It needs a start without zero columns, such as Diagonal's "unit".
    """

    lam: float = 1e-3
    factor: str = "v"
    rho: float | None = None
    eta: float | None = None
    step: str = "sgd"
    metric: str = "euclidean"
    threshold: str = "scaled"
    order: str = "simultaneous"
    weight: float = 0.0
    ramp: tuple[float, int] | None = None
    gauge: str | None = None

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise unknown(f"{name} of L1", getattr(self, name), (str(value) for value in accepted))
        if self.lam < 0:
            raise FedloraError(f"lam must not be negative, got {self.lam}")
        if self.metric == "adam" and self.step != "adam":
            raise FedloraError("metric 'adam' belongs to step 'adam': plain gradients descend in the Euclidean metric")
        if self.gauge is not None and self.factor != "v":
            raise FedloraError(f"gauge 'unit' scales v, not {self.factor}")
        if self.threshold == "plain" and self.eta is not None:
            raise FedloraError("threshold 'plain' is lam itself and has no eta")

    @classmethod
    def sora(cls, lam: float = 3e-4, threshold: str = "plain", weight: float = 10.0) -> "L1":
        """SoRA's code: Adam's step, Euclidean threshold, l1 in the loss besides. Ding et al. 2023."""
        return cls(lam, step="adam", threshold=threshold, weight=weight)

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"l1 on {self.factor} by proximal {self.step} steps, lambda {self.lam:g}"

    @property
    def grouped(self) -> bool:  # type: ignore[override]
        return self.order == "simultaneous"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        if not self.weight:
            return 0.0
        gates = [state[name].flatten() for name in named(self, state, context, self.factor)]
        return self.weight * torch.cat(gates).abs().mean()

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        names = named(self, state, context, self.factor)
        context.memory[f"gradient {self!r}"] = {name: gradient.pop(name) for name in names if name in gradient}

    def prox_(self, state: State, context: Context) -> None:
        gradient, moves = context.memory.pop(f"gradient {self!r}", {}), context.moves
        if self.order == "gauss_seidel" and gradient:
            fresh = context.again()
            gradient = {name: fresh[name] for name in gradient}
        moments = context.memory.setdefault("moments of l1", {})  # by name
        rho = context.lr if self.rho is None else self.rho * context.pace
        tau = self._threshold(context, rho)
        for name, g in gradient.items():
            mean, scale = moments.setdefault(name, _Moments())(g) if self.step == "adam" else (g, torch.ones_like(g))
            metric = scale if self.metric == "adam" else torch.ones_like(g)
            state[name].copy_(weighted_soft_threshold(state[name] - rho * mean / scale, tau, metric))
            if self.gauge == "unit":
                self._absorb(name, state, context, moves)

    def _threshold(self, context: Context, rho: float) -> float:
        lam = self.lam
        if self.ramp is not None:
            t, T = clock(context, self.ramp[1])
            lam += (self.ramp[0] - lam) * t / T
        if self.threshold == "plain":
            return lam
        return lam * (rho if self.eta is None else self.eta * context.pace)

    def _absorb(self, name: str, state: State, context: Context, moves: frozenset[str]) -> None:
        """v_i <- v_i ||b_i|| ||a_i||, b_i and a_i to unit norm, as far as they move."""
        path = context.keys[name].path
        for other, dim in ((f"{path}.A", 1), (f"{path}.B", 0)):
            if other in moves:
                norm = torch.linalg.vector_norm(state[other], dim=dim)  # (r,)
                if (norm == 0).any():
                    raise FedloraError(f"gauge 'unit': '{other}' has a zero direction; use the adapter's start 'unit'")
                state[other].div_(norm.unsqueeze(dim))
                state[name].mul_(norm)


GROUPS = ("directions", "A", "B")


@dataclass(frozen=True)
class GroupLasso(Regularizer):
    """λ Σ_g ||θ_g|| by block soft-thresholding, θ_g <- max(1 - lr λ / ||θ_g||, 0) θ_g after the optimiser's step.

    groups: "directions" are (b_i, a_i) together, "A" the rows a_i, "B" the columns b_i. What is cut is exactly zero.
    Where only one of a_i, b_i is zero the direction can come back; of a pair both gradients are zero from then on. All
    groups weigh the same; v, if there is one, is left alone. Yuan and Lin 2006.
    """

    lam: float = 1e-2
    groups: str = "directions"

    def __post_init__(self) -> None:
        if self.groups not in GROUPS:
            raise unknown("groups of GroupLasso", self.groups, GROUPS)
        ranges(self, lam="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"group lasso on {self.groups}, lambda {self.lam:g}"

    def prox_(self, state: State, context: Context) -> None:
        moves, tau = context.moves, context.lr * self.lam
        roles = ("B", "A") if self.groups == "directions" else (self.groups,)
        for path in layers(context, self.label, LoRA, Diagonal):
            if not together(self, [f"{path}.{role}" for role in roles], moves):
                continue
            rows = {role: state[f"{path}.{role}"].mT if role == "B" else state[f"{path}.{role}"] for role in roles}
            cut = group_soft_threshold(torch.cat(list(rows.values()), dim=1), tau, dim=1)  # (r, m + n)
            for row, new in zip(rows.values(), cut.split([row.shape[1] for row in rows.values()], 1), strict=True):
                row.copy_(new)
