"""θ <- θ - τ_eff sum_k p_k d_k with d_k = (θ - θ_k) / a_k, τ_eff = sum_k p_k a_k: FedNova, Wang et al. 2020."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.mean import mean
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
        updates = list(updates)
        work = [effort(update.steps, self.momentum) for update in updates]
        total = sum(update.weight for update in updates)
        slow = sum(update.weight * a for update, a in zip(updates, work, strict=True)) / total
        fast = sum(update.weight / a for update, a in zip(updates, work, strict=True)) / total
        goal = S.mean([update.state for update in updates], [u.weight / a for u, a in zip(updates, work, strict=True)])
        stepped = {
            name: (now + slow * fast * change).to(goal[name].dtype) for name, now, change in changes(server, goal)
        }
        return mean(server, updates) | stepped
