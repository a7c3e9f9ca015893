"""A value is what its annotation says, however it was typed, or an error that says what is accepted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedlora_mini.accepted import fitting, ranges
from fedlora_mini.errors import FedloraError


@pytest.mark.parametrize(
    ("value", "kind", "read"),
    [
        *((word, bool, True) for word in (True, "True", "yes", "YES", 1, "1")),
        *((word, bool, False) for word in (False, "false", "No", 0, "0")),
        (3, int, 3),
        (3, float, 3),
        (None, int | None, None),
        ("None", int | None, None),
        ("none", str | None, "none"),
        ("^a", str | Mapping[str, str] | None, "^a"),
        ({"a": "b"}, str | Mapping[str, str] | None, {"a": "b"}),
        ([1, 2], float | Sequence[Any], [1, 2]),
    ],
)
def test_a_value_is_read_as_it_is_meant(value, kind, read):
    assert fitting("x", value, kind) == read


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("maybe", bool, "x is true or false .*, got 'maybe'"),
        (2, bool, "true or false"),
        (2.5, int, "x is a whole number, got 2.5"),
        (True, int, "a whole number"),
        ("abc", int | None, "a whole number or none, got 'abc'"),
        (float("nan"), float, "a finite number, got nan"),
        (float("inf"), float, "a finite number"),
        ("abc", float | Sequence[Any], "a finite number or a sequence, got 'abc'"),
        (5, str, "a text, got 5"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_accepted(value, kind, words):
    with pytest.raises(FedloraError, match=words):
        fitting("x", value, kind)


@dataclass(frozen=True)
class Part:
    lam: float = 0.5
    steps: int | None = None

    def __post_init__(self) -> None:
        ranges(self, lam="[0, 1)", steps="[1, inf)")


@pytest.mark.parametrize("changes", [{"lam": 0}, {"lam": 0.99}, {"steps": 1}, {"steps": None}])
def test_numbers_in_their_interval_pass(changes):
    replace(Part(), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lam": -1}, r"lam must be in \[0, 1\), got -1"),
        ({"lam": 1.0}, r"\[0, 1\)"),
        ({"lam": float("nan")}, "lam is a finite number"),
        ({"lam": "abc"}, "lam is a finite number, got 'abc'"),
        ({"steps": 0}, r"steps must be in \[1, inf\), got 0"),
        ({"steps": 1.5}, "steps is a whole number or none"),
    ],
)
def test_numbers_outside_are_named_with_their_interval(changes, words):
    with pytest.raises(FedloraError, match=words):
        replace(Part(), **changes)
