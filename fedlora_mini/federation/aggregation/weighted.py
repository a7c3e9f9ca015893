"""θ <- sum_k w_k θ_k / sum_k w_k with weights w_k that the clients send. FedAS, Yang et al. 2024."""

from collections.abc import Iterable

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.messages import WEIGHT, message
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def weighted(server: State, updates: Iterable[Update]) -> State:
    """The mean, weighted by the clients' own scalar.

    FedAS sends the trace of its empirical Fisher information as "~weight", in place of the number of images.
    """

    def weight(update: Update) -> float:
        value = message(update, WEIGHT)
        if value.numel() != 1:
            raise FedloraError(f"client {update.client}: '{WEIGHT}' is one number, got {tuple(value.shape)}")
        return float(value)

    return S.weighted_mean((S.pick(u.state, lambda name: name != WEIGHT), weight(u)) for u in updates)
