"""Randomness is an argument: a generator made from the words that say what it is for, never a global seed.

Whoever knows the seed knows what a generator gives. What nobody may know comes from the operating system.
"""

import hashlib
import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def seeded(words: str) -> torch.Generator:
    """The same words give the same stream on every machine; other words another one."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))


def unpredictable(count: int) -> NDArray[np.float64]:
    """So many numbers in [0, 1), of 53 random bits each from the operating system: no seed gives them again."""
    bits = np.frombuffer(secrets.token_bytes(8 * count), np.uint64)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def coins(n: int, p: float, generator: torch.Generator | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n,) bool, each true with probability p. generator: None takes the operating system's bits.

    dtype: of the generator's numbers.
    """
    if generator is None:
        return torch.from_numpy(unpredictable(n)) < p
    return torch.rand(n, generator=generator, dtype=dtype) < p
