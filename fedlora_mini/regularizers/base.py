"""What a method adds to the task loss, or does after the optimiser's step."""

from dataclasses import dataclass, field

from torch import Tensor

from fedlora_mini.adapters.base import Key
from fedlora_mini.state import State


@dataclass(frozen=True)
class Context:
    """What a regulariser may look at besides the client's current state."""

    round: int
    step: int
    start: State  # the client's state at the start of the round, detached
    keys: dict[str, Key]
    lr: float
    memory: dict[str, State] = field(default_factory=dict)  # its own, kept from step to step within a round


class Regularizer:
    """Both hooks see ONE client's state; with several clients in one pass they are called for each in turn."""

    label: str = ""

    def penalty(self, state: State, context: Context) -> Tensor | float:
        """Smooth: added to the loss."""
        return 0.0

    def prox_(self, state: State, context: Context) -> None:
        """Non-smooth: changes `state` in place after the optimiser's step."""
