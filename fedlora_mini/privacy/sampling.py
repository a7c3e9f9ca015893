"""Poisson sampling: every record is in a batch with probability q, by a coin of its own. What accountants assume."""

import torch
from torch import Tensor

from fedlora_mini.chance import coins
from fedlora_mini.errors import FedloraError


def rate(batch: int, n: int) -> float:
    """q = batch / n, the rate at which `batch` of n records are expected. Raises if there are fewer."""
    if not 0 < batch <= n:
        raise FedloraError(f"an expected batch of {batch} needs between 1 and {n} of the client's {n} records")
    return batch / n


def poisson(n: int, q: float, generator: torch.Generator | None) -> Tensor:
    """The indices of a Poisson sample of n records, in order; none now and then, that is no error.

    generator: None takes the operating system's coins, which nobody can make again.
    """
    if not 0 <= q <= 1:
        raise FedloraError(f"the sampling rate q must be in [0, 1], got {q}")
    return torch.nonzero(coins(n, q, generator)).flatten()
