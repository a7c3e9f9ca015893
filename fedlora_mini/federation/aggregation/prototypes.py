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
    updates = list(updates)
    rows = torch.stack([message(update, PROTOTYPE) for update in updates])  # (K, C, c)
    counts = torch.stack([message(update, COUNT) for update in updates])  # (K, C)
    weights, count = counts.double().unsqueeze(-1), counts.sum(0)  # (K, C, 1), (C,)
    mean = torch.where(weights > 0, weights * rows, 0.0).sum(0) / weights.sum(0).clamp_min(1e-12)
    has, old = count > 0, server.get(PROTOTYPE, torch.zeros_like(rows[0]))
    out = S.weighted_mean((S.pick(u.state, lambda n: n not in (PROTOTYPE, COUNT)), u.weight) for u in updates)
    out[PROTOTYPE] = torch.where(has.unsqueeze(-1), mean.to(rows.dtype), old)
    out[COUNT] = torch.where(has, count, server.get(COUNT, torch.zeros_like(count)))
    return out
