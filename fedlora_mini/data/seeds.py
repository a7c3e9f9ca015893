"""generator(seed, site, part) gives every use of chance its own stream: a new site never changes another's data."""

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of non-negative integers, e.g. (seed, site index, purpose)."""
    state = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def numpy_generator(*key: int) -> np.random.Generator:
    """The same for numpy: splits and permutations."""
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))
