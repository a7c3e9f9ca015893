"""A value is what its annotation says, however it was typed, or an error that says what is accepted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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
        ([1, 2], list[int], [1, 2]),
        ("a text", Any, "a text"),
        *((number(3), int, 3) for number in (np.int64, np.uint8)),
        *((number(0.5), float, 0.5) for number in (np.float64, np.float32)),
        (np.bool_(False), bool, False),
    ],
)
def test_a_value_is_read_as_it_is_meant(value, kind, read):
    assert fitting("x", value, kind) == read and type(fitting("x", value, kind)) is type(read)


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


def test_annotations_may_stand_as_text():
    """As in a file with `from __future__ import annotations`."""
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    code += "@dataclass(frozen=True)\nclass Late:\n    lam: float = 0.5\n    steps: int | None = None\n"
    exec(compile(code, "late.py", "exec"), made := {"__name__": __name__})
    assert type(made["Late"].__dataclass_fields__["lam"].type) is str
    ranges(made["Late"](), lam="[0, 1)", steps="[1, inf)")
    with pytest.raises(FedloraError, match=r"steps is a whole number or none, got 1\.5"):
        ranges(made["Late"](steps=1.5), steps="[1, inf)")
