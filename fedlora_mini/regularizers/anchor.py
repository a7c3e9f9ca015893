"""(mu/2) ||θ - w||²: stay near the round's start (FedProx, Li et al. 2020) or near another state (Ditto)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


@dataclass(frozen=True)
class Anchor(Regularizer):
    """The squared distance over everything that moves; its gradient is mu (θ - w). target: w, or None for the start."""

    mu: float = 0.01
    target: State | None = None
    free = True

    def __post_init__(self) -> None:
        ranges(self, mu="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"FedProx anchor, mu {self.mu:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        w = context.start if self.target is None else self.target
        moved = [(state[name] - w[name]).square().sum() for name in state if state[name].requires_grad]
        return 0.5 * self.mu * torch.stack(moved).sum()
