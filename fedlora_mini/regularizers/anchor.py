"""(mu/2) ||θ - θ_t||²: stay near the round's start. FedProx, Li et al. 2020."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


@dataclass(frozen=True)
class Anchor(Regularizer):
    """The squared distance, over everything that is trained; its gradient is mu (θ - θ_t)."""

    mu: float = 0.01

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"FedProx anchor, mu {self.mu:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        moved = [(state[name] - context.start[name]).square().sum() for name in state if state[name].requires_grad]
        return 0.5 * self.mu * torch.stack(moved).sum()
