"""lam τ² KL( softmax(f_personal / τ) || softmax(f_common / τ) ): the common part learns from the whole. pFedSAM.

f_personal is the client's network as it is, f_common the same with its private branch silent (every `B_own` zero): what
a site without private factors would get. The teacher has no gradient. The direction and the silent branch are
our reconstruction (chapter 13).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora_mini.accepted import ranges
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


@dataclass(frozen=True)
class Distill(Regularizer):
    """One more forward and backward pass a step."""

    lam: float = 0.5
    tau: float = 2.0

    grouped = False

    def __post_init__(self) -> None:
        ranges(self, lam="[0, inf)", tau="(0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"the common part learns from the whole, lam {self.lam:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        silent = {name: torch.zeros_like(state[name]) for name in context.of("B_own", state)}
        if not silent:
            raise FedloraError("distillation needs an adapter with a private branch, factors 'B_own'")
        with torch.no_grad():
            teacher = context.run(state, context.x)[0]
        student = context.run({**state, **silent}, context.x)[0]
        log_p, log_q = ((f / self.tau).log_softmax(1) for f in (teacher, student))
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)  # (N, *S)
        return self.lam * self.tau**2 * kl.mean()
