"""θ <- sum_k p_k θ_k, p_k proportional to the client's number of images. McMahan et al. 2017."""

from collections.abc import Sequence

from fedlora_mini import state as S
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def mean(server: State, updates: Sequence[Update]) -> State:
    """The weighted mean, factor by factor: for LoRA it is B̄ and Ā, not the mean of the products."""
    return S.mean([u.state for u in updates], [u.weight for u in updates])
