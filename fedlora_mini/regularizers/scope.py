"""Where a training-time companion of an adapter acts: on which layers, and at which step t of how many, T."""

from typing import Any

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context


def layers(context: Context, label: str, *kinds: type[Adapter]) -> dict[str, Any]:
    """path -> adapter, for the adapters of these kinds. Raises if there is none: the companion would do nothing."""
    found = {path: layer for path, layer in context.layers.items() if isinstance(layer, kinds)}
    if not found:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        there = ", ".join(sorted({type(layer).__name__ for layer in context.layers.values()})) or "none"
        raise FedloraError(f"'{label}' needs layers adapted by {wanted}; adapters here: {there}")
    return found


def clock(context: Context, total: int | None) -> tuple[int, int]:
    """(t, T): the step within the round, or with `total` the step counted through all rounds, at most T = total."""
    if total is None:
        return context.step, context.steps
    return min((context.round - 1) * context.steps + context.step, total), total
