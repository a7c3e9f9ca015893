"""What a rule may answer with: one tensor for each that came in, products to be folded, notes; and nothing else."""

from typing import Any

import torch
from torch import Tensor

from fedlora_mini.errors import Diverged, FedloraError
from fedlora_mini.federation.exchange import Rule, is_model
from fedlora_mini.federation.fold import products_in
from fedlora_mini.state import State


def answer(rule: Rule, returned: Any, expected: State) -> State:
    """What the rule returned. Raises, with its name, unless it fits the tensors that travelled, and is finite.

    A rule that `folds` may leave tensors as they are.
    """
    name = getattr(rule, "label", "") or getattr(rule, "__name__", type(rule).__name__)
    if not isinstance(returned, dict) or not all(isinstance(value, Tensor) for value in returned.values()):
        what = f"a {type(returned).__name__}" if not isinstance(returned, dict) else "values that are no tensors"
        raise FedloraError(f"rule '{name}' returned {what}; a rule returns tensors by name, as the clients sent them")
    products = products_in(returned)
    given = {n: value for n, value in returned.items() if is_model(n) and n not in products}
    lacking = [] if getattr(rule, "folds", False) else [n for n in expected if n not in given]
    if odd := [f"no '{n}', which travelled" for n in lacking] + [f"'{n}'" for n in given if n not in expected]:
        such = f", such as '{next(iter(expected))}'" if expected else ""
        accepted = f"the {len(expected)} that travelled{such}, and notes"
        raise FedloraError(f"rule '{name}' returned {odd[0]}; accepted: {accepted}")
    for n, value in given.items():
        got, wanted = ((tuple(t.shape), t.dtype) for t in (value, expected[n]))
        if got != wanted:
            told = " of ".join(map(str, got)), " of ".join(map(str, wanted))
            raise FedloraError(f"rule '{name}' returned '{n}' as {told[0]}, expected {told[1]}")
    if broken := [n for n, value in returned.items() if not bool(torch.isfinite(value).all())]:
        raise Diverged(f"rule '{name}' returned NaN or infinite values in '{broken[0]}'")
    return returned
