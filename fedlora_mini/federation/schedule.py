"""Which tensors move at a round and local step, both from 1. What does not move is bit-identical after the step."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora_mini.adapters.base import Key


@dataclass(frozen=True)
class Schedule:
    """A predicate on (tensor, round, step), with the words that the method table prints."""

    label: str
    test: Callable[[Key, int, int], bool]

    def __call__(self, key: Key, round: int, step: int) -> bool:
        return self.test(key, round, step)

    def moves(self, key: Key, round: int, steps: int) -> bool:
        """Whether the tensor moves in any local step of the round: only then it needs to be sent."""
        return any(self.test(key, round, step) for step in range(1, steps + 1))


together = Schedule("all at every step", lambda key, round, step: True)


def only(factor: str) -> Schedule:
    """One factor moves, the others stay at their common random start; the head moves too."""
    return Schedule(f"only {factor} (and head)", lambda key, round, step: key.region == "head" or key.factor == factor)


def by_round(first: str, second: str) -> Schedule:
    """`first` in odd rounds, `second` in even ones; the head moves always."""

    def test(key: Key, round: int, step: int) -> bool:
        return key.region == "head" or key.factor == (first if round % 2 else second)

    return Schedule(f"{first} in odd rounds, {second} in even", test)
