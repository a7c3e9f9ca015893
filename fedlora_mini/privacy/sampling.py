"""Poisson sampling: every record is in a batch with probability q, by a coin of its own. What accountants assume."""

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError


def rate(batch: int, n: int) -> float:
    """q = batch / n, the rate at which `batch` of n records are expected. Raises if there are fewer."""
    if not 0 < batch <= n:
        raise FedloraError(f"an expected batch of {batch} needs between 1 and {n} of the client's {n} records")
    return batch / n


def poisson(n: int, q: float, generator: torch.Generator) -> Tensor:
    """The indices of a Poisson sample of n records, in order; none now and then, that is no error."""
    if not 0 <= q <= 1:
        raise FedloraError(f"the sampling rate q must be in [0, 1], got {q}")
    return torch.nonzero(torch.rand(n, generator=generator, dtype=torch.float64) < q).flatten()
