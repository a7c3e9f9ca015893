"""Which tensors move at a round and local step, both from 1. What does not move is bit-identical after the step."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora_mini.adapters.base import Key

Test = Callable[[Key, int, int, int], bool]
"""(tensor, round, local step, local steps of the round) -> whether it moves."""


@dataclass(frozen=True)
class Schedule:
    """A predicate on (tensor, round, step, steps), with the words that the method table prints."""

    label: str
    test: Test

    def __call__(self, key: Key, round: int, step: int, steps: int) -> bool:
        return self.test(key, round, step, steps)

    def moves(self, key: Key, round: int, steps: int) -> bool:
        """Whether the tensor moves in any local step of the round: only then it needs to be sent."""
        return any(self.test(key, round, step, steps) for step in range(1, steps + 1))


together = Schedule("all at every step", lambda key, round, step, steps: True)


def only(factor: str) -> Schedule:
    """One factor moves, the others stay at their common random start; the head moves too."""
    return Schedule("nothing else moves", lambda key, round, step, steps: key.region == "head" or key.factor == factor)


def by_round(first: str, second: str) -> Schedule:
    """`first` in odd rounds, `second` in even ones; the head moves always."""

    def test(key: Key, round: int, step: int, steps: int) -> bool:
        return key.region == "head" or key.factor == (first if round % 2 else second)

    return Schedule(f"{first} in odd rounds, {second} in even", test)


def before(share: float, first: Callable[[Key], bool], label: str, then_all: bool = False) -> Schedule:
    """In the first `share` of a round's steps, at least one, only what `first` names moves, then the rest (or all)."""

    def test(key: Key, round: int, step: int, steps: int) -> bool:
        early = step <= max(1, share * steps)
        return first(key) if early else then_all or not first(key)

    return Schedule(label, test)
