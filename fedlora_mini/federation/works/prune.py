"""A client that lowers its own rank once its last directions have shrunk. HetLoRA, Cho et al. 2024."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.federation.aggregation.padded import self_pruned_rank, tail, truncate
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.regularizers import Context, Regularizer
from fedlora_mini.state import State


@dataclass(frozen=True)
class Tail(Regularizer):
    """lam Σ_layers ||B[:, r':]||_F ||A[r':]||_F with r' = floor(gamma r): it pushes the last directions out."""

    lam: float
    gamma: float

    label = "tail norm"

    def penalty(self, state: State, context: Context) -> Tensor:
        own = pairs(state)
        rank = max(len(value) for name, value in own.items() if name.endswith(".A"))
        return self.lam * tail(own, max(1, math.floor(self.gamma * rank + 1e-9)))


@dataclass(frozen=True)
class SelfPruning(Work):
    """gamma: the share of directions before the tail. lam: weight of the tail's penalty."""

    gamma: float = 0.75
    lam: float = 1e-3

    def __post_init__(self) -> None:
        ranges(self, gamma="(0, 1)", lam="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"prunes its rank to {self.gamma:.0%} where the tail shrank"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        start = client.tensors
        terms = (*client.setting.method.objective, Tail(self.lam, self.gamma))
        end, loss = client.fit(round, objective=terms)
        rank = self_pruned_rank(pairs(start), pairs(end), self.gamma)
        return truncate(end, rank), loss, {}


def pairs(state: Mapping[str, Tensor]) -> State:
    """The factors A and B alone."""
    return {name: value for name, value in state.items() if name.endswith((".A", ".B"))}
