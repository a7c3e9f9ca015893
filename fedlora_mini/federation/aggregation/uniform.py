"""θ <- (1/K) Σ_k θ_k: every client counts the same, whatever the number of its images."""

from collections.abc import Iterable
from dataclasses import replace

from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def uniform(server: State, updates: Iterable[Update]) -> State:
    """The mean with equal weights."""
    return mean(server, (replace(update, weight=1.0) for update in updates))
