"""generator(seed, site, part) gives every use of chance its own stream: a new site never changes another's data."""

from numbers import Integral

import numpy as np
import torch

from fedlora_mini.errors import FedloraError


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of non-negative integers, e.g. (seed, site index, purpose)."""
    state = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def numpy_generator(*key: int) -> np.random.Generator:
    """The same for numpy: splits and permutations."""
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))


def split_draws(seed: int, *key: int, test_seed: int | None = None) -> tuple[np.random.Generator, ...]:
    """What a split is drawn from: the seed, and with a `test_seed` also what draws the test images.

    Then those are the same at every seed, and a search on another seed's validation images never meets one.
    """
    held = () if test_seed is None else (numpy_generator(checked(test_seed), *key),)
    return numpy_generator(seed, *key), *held


def checked(seed: int, name: str = "test_seed") -> int:
    """The number itself, or an error that says what one is."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        none = ", or None" if name == "test_seed" else ""
        raise FedloraError(f"{name} is a whole number from 0 to 2**64 - 1{none}; got {seed!r}")
    return seed
