"""N(0, std^2) on every entry: the only step of a mechanism that makes it private.

A seeded generator is for experiments, which must be made again: whoever knows the seed can subtract the noise, and toss
the coins again that say who was drawn. For real records both must be secret: `Secure` takes noise from the operating
system, and samples that are given no generator take their coins from there (`RunConfig.secure` does both).
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora_mini.chance import unpredictable
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


class Source(Protocol):
    """Standard normal numbers of a shape, float32 or float64."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class Seeded:
    """A torch generator: the same seed, the same noise."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype)


class Secure:
    """Numbers that nobody can make again: each is the scaled sum of `parts` normals from the system's random bits.

    A sum of several blunts attacks that read the private value off the lowest bits of one floating-point sample
    (Mironov 2012; Holohan and Braghin 2021). It does not make floating-point arithmetic exact.
    """

    def __init__(self, parts: int = 4) -> None:
        if parts < 1:
            raise FedloraError(f"secure noise needs at least one part, got {parts}")
        self.parts = parts

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        total = np.zeros(count)
        for _ in range(self.parts):
            u, v = unpredictable(2 * count).reshape(2, count)
            total += np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)  # Box and Muller
        return torch.from_numpy(total / math.sqrt(self.parts)).view(shape).to(dtype)


def add_noise(state: Mapping[str, Tensor], std: float, source: Source) -> State:
    """state + std N(0, I), drawn in the alphabetical order of names, whatever the state's. std = 0 keeps the bits."""
    if not std >= 0 or math.isinf(std):
        raise FedloraError(f"the noise's standard deviation must be finite and at least 0, got {std}")
    if std == 0:
        return dict(state)
    noise = {name: source.normal(tuple(state[name].shape), state[name].dtype) for name in sorted(state)}
    return {name: value + std * noise[name].to(value.device) for name, value in state.items()}
