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
    """The names, after checking that every state has exactly the same ones."""
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


def mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """sum_k p_k state_k with p_k = weights_k / sum(weights); floating dtype kept, summed in order in float64."""
    if not states or len(states) != len(weights):
        raise FedloraError(f"a mean needs one weight per state: {len(states)} states, {len(weights)} weights")
    total = float(sum(weights))
    if total <= 0 or min(weights) < 0:
        raise FedloraError(f"weights must be non-negative with a positive sum, got {list(weights)}")
    out: State = {}
    for name in same_names(states):
        value = torch.zeros_like(states[0][name], dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            value += (weight / total) * state[name].double()
        out[name] = value.to(states[0][name].dtype)
    return out


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
    return {name: torch.stack([state[name] for state in states]) for name in same_names(states)}


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
