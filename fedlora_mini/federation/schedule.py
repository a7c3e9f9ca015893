"""Which tensors move at a round and local step, both from 1. What does not move is bit-identical after the step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora_mini.adapters.base import Key
from fedlora_mini.errors import FedloraError, unknown

Test = Callable[[Key, int, int, int], bool]
"""(tensor, round, local step, local steps of the round) -> whether it moves."""


NOTHING: Mapping[str, Tensor] = {}
MODE = "~mode/"  # begins the server's notes, one a layer, on the factor that moves in this round: 0 is B, 1 is A


@dataclass(frozen=True)
class Schedule:
    """A predicate on (tensor, round, step, steps), with the words that the method table prints.

    notes: what server and clients remember; a schedule that `asks` leaves the choice of a layer's factor to the server.
    turns: where two factors take turns, the same schedule by the factor that is first. named: the factors that the
    words name, which an adapter may not have.
    """

    label: str
    test: Test
    asks: bool = False
    turns: "Callable[[str], Schedule] | None" = None
    named: tuple[str, ...] = ()

    def beginning(self, first: str) -> "Schedule":
        """The same turns, with this factor first. Raises where nothing takes turns."""
        if self.turns is None:
            raise FedloraError(f"no factor is first where the schedule is '{self.label}'")
        if first not in ("A", "B"):
            raise unknown("factor", first, ("A", "B"))
        return self.turns(first)

    def __call__(self, key: Key, round: int, step: int, steps: int, notes: Mapping[str, Tensor] = NOTHING) -> bool:
        return self.test(key, round, step, steps) and (not self.asks or chosen(key, notes))

    def moves(self, key: Key, round: int, steps: int, notes: Mapping[str, Tensor] = NOTHING) -> bool:
        """Whether the tensor moves in any local step of the round: only then it needs to be sent."""
        return any(self(key, round, step, steps, notes) for step in range(1, steps + 1))

    def may_move(self, key: Key, rounds: int, steps: int) -> bool:
        """Whether it moves in one of the first rounds, should the server want it."""
        times = [(t, step) for t in range(1, rounds + 1) for step in range(1, steps + 1)]
        return any(self.test(key, t, step, steps) for t, step in times)


def chosen(key: Key, notes: Mapping[str, Tensor]) -> bool:
    """Whether the server's note on the layer names this factor; B without a note. What is no factor moves always."""
    if key.factor not in "AB":
        return True
    mode = notes.get(f"{MODE}{key.path}")
    return key.factor == ("A" if mode is not None and bool(mode) else "B")


together = Schedule("all at every step", lambda key, round, step, steps: True)


def only(factor: str) -> Schedule:
    """One factor moves, the others stay at their common random start; the head moves too."""
    rest = "A" if factor == "B" else "B"

    def test(key: Key, round: int, step: int, steps: int) -> bool:
        return key.region == "head" or key.factor == factor

    return Schedule(f"{rest} never moves", test, named=(factor,))


def _turns(make: Callable[[str, str], Schedule], first: str, second: str) -> Callable[[str], Schedule]:
    """Factor -> the schedule in which it is the first of the two."""
    return lambda factor: make(first, second) if factor == first else make(second, first)


def by_round(first: str, second: str) -> Schedule:
    """`first` in odd rounds, `second` in even ones; the head moves always."""

    def test(key: Key, round: int, step: int, steps: int) -> bool:
        return key.region == "head" or key.factor == (first if round % 2 else second)

    label = f"{first} in odd rounds, {second} in even"
    return Schedule(label, test, turns=_turns(by_round, first, second), named=(first, second))


def by_step(first: str, second: str) -> Schedule:
    """`first` in odd local steps, `second` in even ones; the head moves always."""

    def test(key: Key, round: int, step: int, steps: int) -> bool:
        return key.region == "head" or key.factor == (first if step % 2 else second)

    label = f"{first} in odd steps, {second} in even"
    return Schedule(label, test, turns=_turns(by_step, first, second), named=(first, second))


as_told = Schedule("one factor a layer, as the server says", lambda key, round, step, steps: True, asks=True)


def before(share: float, first: Callable[[Key], bool], label: str, then_all: bool = False) -> Schedule:
    """In the first `share` of a round's steps, at least one, only what `first` names moves, then the rest (or all)."""

    def test(key: Key, round: int, step: int, steps: int) -> bool:
        early = step <= max(1, share * steps)
        return first(key) if early else then_all or not first(key)

    return Schedule(label, test)
