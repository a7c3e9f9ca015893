"""(Ā, B̄) of pairs padded with zeros to the server's rank, weighted by ||B_k A_k||_F. HetLoRA, Cho et al. 2024."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.pairs import layers, product_norm, unequal, widened
from fedlora_mini.federation.exchange import Update, is_model
from fedlora_mini.state import State


@unequal
def padded(server: State, updates: Iterable[Update]) -> State:
    """The mean of zero-padded pairs, weighted by the norm of their product.

    p_k proportional to ||B_k A_k||_F, layer by layer: the paper writes its weights for one matrix. The images count
    where every product is zero, and for the tensors that are no pairs. Padding leaves each s B_k A_k as it is. One pass
    over the updates, in the memory of two states.
    """
    by_images, by_norm = S.WeightedMean(), defaultdict[str, S.WeightedMean](S.WeightedMean)
    for update in updates:
        wide = dict(update.state)
        for path in layers(update.state):
            b, a = f"{path}.B", f"{path}.A"
            wide[b], wide[a] = widened(wide[b], wide[a], len(server[a]))
            by_norm[path].add({b: wide[b], a: wide[a]}, product_norm(wide[b].double(), wide[a].double()))
        by_images.add(wide, update.weight)
    out = by_images.value()
    for mean in by_norm.values():
        out |= mean.value() if mean.weight else {}
    return out


def truncate(state: Mapping[str, Tensor], rank: int) -> State:
    """A[:rank], B[:, :rank] of every layer: what a client of that rank takes from the server. Notes and folds stay."""
    if rank < 1:
        raise FedloraError(f"rank must be at least 1, got {rank}")
    cut, out = {"A": (slice(rank),), "B": (slice(None), slice(rank))}, dict(state)
    for name in filter(is_model, state):
        path, _, factor = name.rpartition(".")
        if factor in cut and not path.endswith(".fold"):
            out[name] = state[name][cut[factor]].clone()
    return out


def tail(state: Mapping[str, Tensor], rank: int) -> Tensor:
    """sum over layers of ||B[:, rank:]||_F ||A[rank:]||_F: what lies beyond `rank`. HetLoRA's penalty is λ times it."""
    sizes = [state[f"{path}.B"][:, rank:].norm() * state[f"{path}.A"][rank:].norm() for path in layers(state)]
    return torch.stack(sizes).sum()


def self_pruned_rank(before: Mapping[str, Tensor], after: Mapping[str, Tensor], gamma: float = 0.99) -> int:
    """floor(γ r), at least 1, if the tail beyond it has shrunk during local training, else r = the client's rank.

    `before` and `after` are the client's shared tensors; the tail is summed over layers, so a client has one rank.
    """
    if not 0 < gamma < 1:
        raise FedloraError(f"gamma is a share of the rank in (0, 1), got {gamma}")
    r = max(len(after[f"{path}.A"]) for path in layers(after))
    smaller = max(1, math.floor(gamma * r + 1e-9))
    return smaller if tail(after, smaller) < tail(before, smaller) else r
