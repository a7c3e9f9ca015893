"""Which tensors a regulariser acts on, and whether they move together at a step."""

from collections.abc import Sequence

from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


def named(term: Regularizer, state: State, context: Context, *factors: str) -> list[str]:
    """The names whose role is one of `factors`. Raises if there is none: the term would do nothing."""
    found = [name for factor in factors for name in context.of(factor, state)]
    if not found:
        there = ", ".join(sorted({context.keys[name].factor for name in state})) or "none"
        raise FedloraError(f"'{term.label}' needs factors {' or '.join(factors)}; factors here: {there}")
    return found


def together(term: Regularizer, names: Sequence[str], moves: frozenset[str]) -> bool:
    """Whether all of `names` move, or none. Raises for some: a joint proximal step cannot hold a part of them still."""
    count = sum(name in moves for name in names)
    if 0 < count < len(names):
        still = ", ".join(name for name in names if name not in moves)
        raise FedloraError(f"'{term.label}' moves {', '.join(names)} jointly, but the schedule holds {still} still")
    return count > 0
