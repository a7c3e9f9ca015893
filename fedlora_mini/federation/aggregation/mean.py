"""θ <- sum_k p_k θ_k, p_k proportional to the client's number of images. McMahan et al. 2017."""

from collections.abc import Iterable

from fedlora_mini import state as S
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def mean(server: State, updates: Iterable[Update]) -> State:
    """The weighted mean, factor by factor.

    For LoRA it is B̄ and Ā, not the mean of the products. One pass over the updates, in the memory of one state: they
    may come from a generator.
    """
    return S.weighted_mean((update.state, update.weight) for update in updates)
