"""c̄_y <- sum_k n_ky c_ky / sum_k n_ky: the mean feature of every class over all clients. FedProto, Tan et al. 2022."""

from collections.abc import Iterable

import torch

from fedlora_mini import state as S
from fedlora_mini.federation.aggregation.messages import COUNT, PROTOTYPE, message
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def prototypes(server: State, updates: Iterable[Update]) -> State:
    """The mean of class prototypes, weighted by the samples of the class.

    A client sends "~prototype" (C, c) and "~count" (C,); a row of count 0 is not read. A class that nobody has keeps
    the server's row and count; one that nobody ever had has count 0. What else travels is averaged by images.
    """
    rest, sums, counts = S.WeightedMean(), torch.zeros(()), torch.zeros(())
    for update in updates:
        rows, count = message(update, PROTOTYPE), message(update, COUNT)  # (C, c), (C,)
        n = count.double().unsqueeze(-1)
        sums, counts = sums + torch.where(n > 0, n * rows, 0.0), counts + count
        rest.add(S.pick(update.state, lambda name: name not in (PROTOTYPE, COUNT)), update.weight)
    out, has = rest.value(), counts > 0
    mean = (sums / counts.double().unsqueeze(-1).clamp_min(1e-12)).to(rows.dtype)
    out[PROTOTYPE] = torch.where(has.unsqueeze(-1), mean, server.get(PROTOTYPE, torch.zeros_like(rows)))
    out[COUNT] = torch.where(has, counts, server.get(COUNT, torch.zeros_like(counts)))
    return out
