"""θ_i <- sum_k p_k M_ki θ_ki / sum_k p_k M_ki, entry by entry: the server's side of pFL-ResFIM. Chapter 12."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.exchange import MASK, Update, is_model
from fedlora_mini.state import State


def masked(server: State, updates: Iterable[Update]) -> State:
    """The mean of every entry over the clients that give it.

    A client sends "<name>~mask" beside a tensor: 1 where the entry is for all, 0 where it is its own. A tensor without
    a mask is given whole. What nobody gives stays as the server has it.
    """
    sums = S.weighted_mean((terms(update), update.weight) for update in updates)
    out: State = {}
    for name in filter(is_model, sums):
        given, now = sums[name + MASK], server[name]
        out[name] = torch.where(given > 0, sums[name] / given, now.double()).to(now.dtype)
    return out


def terms(update: Update) -> dict[str, Tensor]:
    """M ⊙ θ and M of every tensor, in float64."""
    sent = update.state
    lost = [name for name in sent if name.endswith(MASK) and name.removesuffix(MASK) not in sent]
    if lost:
        raise FedloraError(f"client {update.client} sent '{lost[0]}' without the tensor")
    names = [name for name in sent if is_model(name)]
    masks = {name: sent.get(name + MASK, torch.ones_like(sent[name])).double() for name in names}
    return {n: masks[n] * sent[n] for n in names} | {n + MASK: M for n, M in masks.items()}
