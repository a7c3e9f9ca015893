"""A_ij <- 0 where |A_ij| EMA(||x_j||) is in the lower half of row i: inputs that a row hardly uses are cut off."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.adapters.prilora import PRILoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.state import State


def least(importance: Tensor, ratio: float) -> Tensor:
    """True at the floor(ratio * n) smallest entries of every row; of equal ones the first. (r, n) -> (r, n)."""
    order = importance.argsort(dim=1, stable=True)[:, : int(ratio * importance.shape[1])]
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order, True)


@dataclass(frozen=True)
class InputMask(Regularizer):
    """PRILoRA's pruning: every `every` steps the least important share `ratio` of each row of A is set to zero.

    ||x_j|| is the norm of input j over the step's batch, as the adapter has seen it, and its average follows
    EMA <- beta EMA + (1 - beta) ||x_j||, starting from the round's first batch. Steps are counted through the rounds.
    Reconstruction: beta, and that a zero is set once and then trains on, so that an entry can grow back until the next
    pruning; the paper leaves both open. Benedek and Wolf 2024.
    """

    every: int = 40
    ratio: float = 0.5
    beta: float = 0.9

    def __post_init__(self) -> None:
        if self.every < 1:
            raise FedloraError(f"every must be at least 1, got {self.every}")
        for name in ("ratio", "beta"):
            if not 0 <= getattr(self, name) < 1:
                raise FedloraError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"input mask, {self.ratio:.0%} of A every {self.every} steps"

    def prox_(self, state: State, context: Context) -> None:
        moves = context.moves
        averages: State = context.memory.setdefault("mask", {})
        for path, layer in layers(context, self.label, PRILoRA).items():
            seen = layer.seen if context.index is None else layer.seen[context.index]  # (n,)
            averages[path] = torch.lerp(seen, averages.get(path, seen), self.beta)
            t = (context.round - 1) * context.steps + context.step
            if t % self.every == 0 and f"{path}.A" in moves:
                A = state[f"{path}.A"]
                A.masked_fill_(least(A.abs() * averages[path], self.ratio), 0.0)
