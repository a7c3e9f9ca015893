"""What may be done with a noisy gradient for free: post-processing, as terms of a row's objective.

They see the released gradient and nothing else, so they cost no privacy. Those in space smooth along the axis of
features, of A (…, r, n) its rows and of B (…, m, r) its columns, never across the rank, and of a client's own A_own and
B_own alike. Chapter 17.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.chance import seeded
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State

AXES = {"A": -1, "B": -2, "A_own": -1, "B_own": -2}  # of the features; in front of both may stand that of experts
TAPS = {3: (1, 2, 1), 5: (1, 4, 6, 4, 1), 7: (1, 6, 15, 20, 15, 6, 1)}


def along_features(gradient: State, context: Context, change: Callable[[str, Tensor, int], Tensor]) -> None:
    """Put change(name, g, axis) in the place of every factor's gradient; the head and other tensors stay."""
    for name in gradient:
        axis = AXES.get(context.keys[name].factor)
        if axis is not None:
            gradient[name] = change(name, gradient[name], axis)


@cache
def kernel(taps: int) -> Tensor:
    """Binomial weights, sum 1: (taps,)."""
    if taps not in TAPS:
        raise FedloraError(f"a low-pass filter has {', '.join(map(str, TAPS))} taps, not {taps}")
    weights = torch.tensor(TAPS[taps], dtype=torch.float64)
    return weights / weights.sum()


@cache
def neighbours(n: int, taps: int) -> Tensor:
    """(taps, n): which entries each output is made of. Mirrored beyond the edges, edge included, as often as needed."""
    ring = (torch.arange(n) + torch.arange(-(taps // 2), taps // 2 + 1).unsqueeze(1)) % (2 * n)
    return torch.where(ring < n, ring, 2 * n - 1 - ring)  # ... 1 0 | 0 1 ... n-1 | n-1 n-2 ...


def smooth(value: Tensor, axis: int, taps: int = 5) -> Tensor:
    """Convolve a matrix with the binomial kernel along one axis, mirrored at the edges.

    Frequency response cos(omega / 2)^(taps - 1); variance of white noise times sum w^2 = 70/256 at five taps. A
    constant stays.
    """
    near = value.movedim(axis, -1)[..., neighbours(value.shape[axis], taps).to(value.device)]  # (…, taps, n)
    return (kernel(taps).to(value) @ near).movedim(-1, axis)


@lru_cache(maxsize=64)
def _gather(factors: tuple[tuple[str, tuple[int, ...], int], ...], taps: int, permuted: bool, device: str) -> Tensor:
    """(taps, entries of all factors): `neighbours` among the factors' entries laid end to end: one look-up for all."""
    parts, begin = [], 0
    for name, shape, axis in factors:
        n, entries = shape[axis], torch.arange(begin, begin + math.prod(shape)).view(shape)
        near = neighbours(n, taps)
        if permuted:
            order = torch.randperm(n, generator=seeded(f"permuted filter {name}"))
            near = order[near][:, torch.argsort(order)]
        parts.append(torch.stack([entries.index_select(axis, row).flatten() for row in near]))
        begin += entries.numel()
    return torch.cat(parts, 1).to(device)


@dataclass(frozen=True)
class LowPass(Regularizer):
    """The binomial filter along the features of every factor; the head and other tensors pass unchanged.

    permuted: along a fixed random order of them instead, the control that tells smoothing from shrinking.
    """

    taps: int = 5
    permuted: bool = False
    label = "low-pass filter"
    free = True

    def __post_init__(self) -> None:
        kernel(self.taps)

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        axes = {name: AXES[context.keys[name].factor] for name in gradient if context.keys[name].factor in AXES}
        if not axes:
            return
        told = tuple((name, tuple(gradient[name].shape), axis) for name, axis in axes.items())
        flat = torch.cat([gradient[name].flatten() for name in axes])
        out = kernel(self.taps).to(flat) @ flat[_gather(told, self.taps, self.permuted, str(flat.device))]
        for (name, shape, _), part in zip(told, out.split([math.prod(shape) for _, shape, _ in told]), strict=True):
            gradient[name] = part.view(shape)


@cache
def ring_gain(n: int, strength: float) -> Tensor:
    """What (I - strength * Delta)^(-1) does to each of n // 2 + 1 frequencies of a ring of n."""
    turns = torch.arange(n // 2 + 1, dtype=torch.float64) / n
    return 1 / (1 + strength * (2 - 2 * torch.cos(2 * torch.pi * turns)))


@dataclass(frozen=True)
class Laplacian(Regularizer):
    """(I - strength * Delta)^(-1) along the features, on a ring, by FFT. Wang et al. 2020 (DP-LSSGD)."""

    strength: float = 1.0
    label = "Laplacian smoothing"
    free = True

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise FedloraError(f"the strength of Laplacian smoothing must be at least 0, got {self.strength}")

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        along_features(gradient, context, self._smooth)

    def _smooth(self, name: str, g: Tensor, axis: int) -> Tensor:
        n = g.shape[axis]
        spectrum = torch.fft.rfft(g.movedim(axis, -1)) * ring_gain(n, self.strength).to(g)
        return torch.fft.irfft(spectrum, n=n).movedim(-1, axis)


@dataclass(frozen=True)
class Doppler(Regularizer):
    """A low-pass filter along time: m_t = -sum_i a_i m_{t-i} + sum_i b_i g_{t-i}, divided by its response to all ones.

    Without the division the first steps would be too short, as Adam's would. It starts anew in every round, and a
    tensor's past is that of the steps in which it moved. Default: first order, a = -0.9, b = 0.1. Zhang et al. 2024.
    """

    a: tuple[float, ...] = (-0.9,)
    b: tuple[float, ...] = (0.1,)
    label = "DOPPLER"
    free = True

    def __post_init__(self) -> None:
        if not self.b:
            raise FedloraError("DOPPLER needs at least one coefficient b")

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        for name, g in gradient.items():
            past = context.memory.setdefault(f"doppler {name}", {"g": [], "m": [], "1": [], "c": []})
            m = self._next(g, past["g"], past["m"])
            gradient[name] = m / self._next(1.0, past["1"], past["c"])

    def _next(self, g: Any, inputs: list[Any], outputs: list[Any]) -> Any:
        """The filter's next output; the queues, newest first, take it in."""
        inputs.insert(0, g)
        del inputs[len(self.b) :]
        m = sum(b * x for b, x in zip(self.b, inputs, strict=False))
        m = m - sum(a * y for a, y in zip(self.a, outputs, strict=False))
        outputs.insert(0, m)
        del outputs[len(self.a) :]
        return m


@dataclass(frozen=True)
class Rescale(Regularizer):
    """A constant factor on the factors' gradients: the control that shrinks as the filter does and smooths nothing."""

    factor: float = (70 / 256) ** 0.5
    label = "rescaled gradient"
    free = True

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        along_features(gradient, context, lambda name, g, axis: self.factor * g)


SPATIAL = (LowPass, Rescale, Laplacian)  # they act along the features of factors, and on nothing else
FILTERS: dict[str, tuple[Regularizer, ...]] = {
    "none": (),
    "low-pass": (LowPass(),),
    "permuted": (LowPass(permuted=True),),
    "rescaled": (Rescale(),),
    "laplacian": (Laplacian(),),
    "doppler": (Doppler(),),
}
"""What `but(filter=…)` puts in the place of a row's own filters."""
