"""Values as their annotation wants them: "no" is False where a bool is meant, 2.5 no whole number, NaN no number."""

import math
import types
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from fedlora_mini.errors import FedloraError

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
READ: dict[Any, Callable[[Any], Any]] = {
    bool: lambda value: TRUTH[str(value).lower()],
    int: int,
    float: lambda value: int(value) if isinstance(value, Integral) else float(value),
    type(None): lambda value: None,
}
WORDS = {
    bool: "true or false (also yes, no, 1, 0)",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "none",
}


def fitting(what: str, value: Any, kind: Any) -> Any:
    """The value, read by an annotation such as `int | None`. Raises with `what` it is for and what is accepted.

    Where it is no plain value, such as a function's, the value is of that kind, and never a text or a number. A number
    of NumPy becomes one of Python.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for each in kinds:
        if _fits(value, get_origin(each) or each):
            return READ[each](value) if each in READ else value
    told = " or ".join(WORDS.get(each, f"a {(get_origin(each) or each).__name__.lower()}") for each in kinds)
    raise FedloraError(f"{what} is {told}, got {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is bool:
        return str(value).lower() in TRUTH
    if kind is type(None):
        return value is None or str(value).lower() in ("none", "null")
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and -math.inf < value < math.inf
    if kind is Any:
        return True
    if kind in (Sequence, tuple, list):
        return isinstance(value, Sequence) and not isinstance(value, str)
    if kind is str:
        return isinstance(value, str)
    return not isinstance(value, str | int | float) and (not isinstance(kind, type) or isinstance(value, kind))


def ranges(part: Any, **intervals: str) -> None:
    """Raise unless these fields of a dataclass are numbers in their intervals: `ranges(self, lam="[0, inf)")`.

    Whole ones where the annotation says int; None where it may be.
    """
    for name, interval in intervals.items():
        value = fitting(name, getattr(part, name), get_type_hints(type(part))[name])
        least, most = (float(end) for end in interval[1:-1].split(", "))
        above = value is None or (value >= least if interval[0] == "[" else value > least)
        if not above or (value is not None and not (value <= most if interval[-1] == "]" else value < most)):
            raise FedloraError(f"{name} must be in {interval}, got {value}")
