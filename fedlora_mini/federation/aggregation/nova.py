"""θ <- θ - τ_eff sum_k p_k d_k with d_k = (θ - θ_k) / a_k, τ_eff = sum_k p_k a_k: FedNova, Wang et al. 2020."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.optimisers import changes
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def effort(steps: int, momentum: float = 0.0) -> float:
    """a = ||a||_1 of τ local SGD steps: τ, or [τ - ρ (1 - ρ^τ) / (1 - ρ)] / (1 - ρ) with momentum ρ."""
    if steps < 1:
        raise FedloraError(f"an update comes from at least 1 local step, got {steps}")
    rho = momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


@dataclass(frozen=True)
class Nova:
    """The mean of changes per local step, times the mean number of steps: who works more does not weigh more.

    Equal to the mean with weights w_k / a_k, and a step of κ = (sum_k p_k a_k)(sum_k p_k / a_k) >= 1 from the server's
    tensors to it; κ = 1 at equal steps. For clients with SGD: τ_k = `update.steps`, `momentum` is their ρ.

    At equal steps, a run's default, it is the mean: give `passes`, for steps by each client's own data, and `optimiser`
    "sgd". After Adam's steps, whose length is not that of the gradients, it is no more than a mean by number of steps.
    """

    momentum: float = 0.0
    label: ClassVar[str] = "mean of changes per local step"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise FedloraError(f"momentum lies in [0, 1), got {self.momentum}")

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        by_images, by_pace, work = S.WeightedMean(), S.WeightedMean(), 0.0  # weights w_k and w_k / a_k; sum_k w_k a_k
        for update in updates:
            a = effort(update.steps, self.momentum)
            by_images.add(update.state, update.weight)
            by_pace.add(update.state, update.weight / a)
            work += update.weight * a
        goal, out = by_pace.value(), by_images.value()
        kappa = (work / by_images.weight) * (by_pace.weight / by_images.weight)
        return out | {n: (now + kappa * change).to(out[n].dtype) for n, now, change in changes(server, goal)}
