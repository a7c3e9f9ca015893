"""State = dict[str, Tensor]: what a model trains, by name `<module path>.<factor>`. Pure functions on it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError

State = dict[str, Tensor]


def pick(state: Mapping[str, Tensor], keep: Callable[[str], bool]) -> State:
    """The part of `state` whose names pass `keep`."""
    return {name: value for name, value in state.items() if keep(name)}


def same_names(states: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The names, after checking that every state has exactly the same ones. Raises where there is no state."""
    if not states:
        raise FedloraError("states are combined by their names: at least one is needed, got none")
    names = list(states[0])
    for other in states[1:]:
        if other.keys() != states[0].keys():
            raise FedloraError(f"states differ in names: {sorted(set(names) ^ set(other))[:4]}")
    return names


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], weight: float = 1.0) -> State:
    """a + weight * b."""
    return {name: a[name] + weight * b[name] for name in same_names([a, b])}


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> State:
    """a - b."""
    return add(a, b, -1.0)


def scale(a: Mapping[str, Tensor], factor: float) -> State:
    """factor * a."""
    return {name: factor * value for name, value in a.items()}


class WeightedMean:
    """sum_k w_k state_k / sum_k w_k of states that pass one by one: `add` each, then ask for the `value`.

    Holds one state in float64, whatever their number; sums in the order in which they come; keeps their dtype.
    weight: sum_k w_k so far.
    """

    def __init__(self) -> None:
        self.weight, self.sums, self.kept = 0.0, State(), dict[str, torch.dtype]()
        self.empty = True

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Take one state in. Raises for a weight that is negative, and for names or shapes that the first had not."""
        if not weight >= 0:
            raise FedloraError(f"weights must be non-negative with a positive sum, got {weight}")
        if self.empty:
            self.sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
            self.kept, self.empty = {name: value.dtype for name, value in state.items()}, False
        for name in same_names([self.sums, state]):
            if state[name].shape != self.sums[name].shape:
                shapes = f"{tuple(self.sums[name].shape)}, {tuple(state[name].shape)}"
                raise FedloraError(f"states differ in the shape of '{name}': {shapes}")
            self.sums[name].add_(state[name], alpha=weight)
        self.weight += weight

    def value(self) -> State:
        """The mean of what was added. Raises where nothing was, or nothing with a weight."""
        if self.weight <= 0:
            raise FedloraError(f"a mean needs states whose weights have a positive sum, got {self.weight}")
        return {name: (value / self.weight).to(self.kept[name]) for name, value in self.sums.items()}


def weighted_mean(weighted: Iterable[tuple[Mapping[str, Tensor], float]]) -> State:
    """sum_k w_k state_k / sum_k w_k in one pass: `WeightedMean` of pairs of a state and its weight."""
    mean = WeightedMean()
    for state, weight in weighted:
        mean.add(state, weight)
    return mean.value()


def mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """sum_k p_k state_k with p_k = weights_k / sum(weights): `weighted_mean` of states that are all there."""
    if len(states) != len(weights):
        raise FedloraError(f"a mean needs one weight per state: {len(states)} states, {len(weights)} weights")
    return weighted_mean(zip(states, weights, strict=True))


def norm(state: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of everything in it, in float64."""
    return float(sum((value.double() ** 2).sum() for value in state.values())) ** 0.5


def nbytes(state: Mapping[str, Tensor]) -> int:
    """Bytes on the wire, without names."""
    return sum(value.numel() * value.element_size() for value in state.values())


def count(state: Mapping[str, Tensor]) -> int:
    """Number of scalars."""
    return sum(value.numel() for value in state.values())


def clone(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def stack(states: Sequence[Mapping[str, Tensor]]) -> State:
    """K states -> one with a leading group axis: (…) -> (K, …)."""
    names = same_names(states)
    for name in names:
        if len(shapes := {tuple(state[name].shape) for state in states}) > 1:
            raise FedloraError(f"states differ in the shape of '{name}': {', '.join(map(str, sorted(shapes)))}")
    return {name: torch.stack([state[name] for state in states]) for name in names}


def unstack(state: Mapping[str, Tensor]) -> list[State]:
    """The inverse of `stack`."""
    size = {value.shape[0] for value in state.values()}
    if len(size) != 1:
        raise FedloraError(f"group axes differ: {sorted(size)}")
    return [{name: value[k] for name, value in state.items()} for k in range(size.pop())]


def finite(state: Mapping[str, Tensor]) -> bool:
    """No NaN, no infinity."""
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def digest(states: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes: equal digests mean equal bytes."""
    sha = hashlib.sha256()
    for state in [states] if isinstance(states, Mapping) else states:
        for name in sorted(state):
            value = state[name].detach().cpu().contiguous()
            sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            sha.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return sha.hexdigest()
