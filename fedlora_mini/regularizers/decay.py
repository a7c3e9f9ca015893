"""(μ/2) ||θ||² on chosen factors, as a term of the loss or as its proximal step θ / (1 + lr μ)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.errors import unknown
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.names import named
from fedlora_mini.regularizers.proximal import shrink
from fedlora_mini.state import State

FORMS = ("proximal", "smooth")


@dataclass(frozen=True)
class WeightDecay(Regularizer):
    """form "proximal": after the optimiser's step, whatever it is; "smooth": in the loss, so through Adam's moments.

    The proximal form is decoupled decay in its implicit variant: AdamW multiplies by 1 - lr μ, this by 1 / (1 + lr μ),
    which is stable for every μ. `on`: the roles that decay. On A and B it is half of the variational nuclear norm, and
    together with L1 on v it makes (c B, v / c, A) no longer a way around the penalty.
    """

    mu: float = 1e-2
    on: tuple[str, ...] = ("A", "B")
    form: str = "proximal"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of WeightDecay", self.form, FORMS)
        ranges(self, mu="[0, inf)")

    free = True

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"weight decay on {', '.join(self.on)}, mu {self.mu:g}"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        if self.form != "smooth":
            return 0.0
        squares = [state[name].square().sum() for name in named(self, state, context, *self.on)]
        return 0.5 * self.mu * torch.stack(squares).sum()

    def prox_(self, state: State, context: Context) -> None:
        moves = context.moves
        if self.form == "proximal":
            for name in named(self, state, context, *self.on):
                if name in moves:
                    state[name].copy_(shrink(state[name], context.lr * self.mu))
