"""Rules that a few arbitrary updates cannot move far. Weights are claims of the clients: every update counts alike."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.pairs import in_order
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def middle(values: Tensor, cut: int) -> Tensor:
    """The mean over clients without the `cut` smallest and `cut` largest, entry by entry: (K, …) -> (…)."""
    ordered = values.double().sort(dim=0).values
    return ordered[cut : len(values) - cut].mean(0).to(values.dtype)


def median(server: State, updates: Iterable[Update]) -> State:
    """The median of every entry.

    Of an even number of clients it is the mean of the two in the middle. Yin et al. 2018.
    """
    stacked = S.stack([update.state for update in updates])
    return {name: middle(values, (len(values) - 1) // 2) for name, values in stacked.items()}


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every entry without the smallest and the largest share of the clients. Yin et al. 2018.

    At least that share of K, rounded up, is cut at each end: three clients and 0.2 give the median.
    """

    share: float = 0.2
    label: ClassVar[str] = "trimmed mean"

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise FedloraError(f"share is cut at each end and lies in (0, 0.5), got {self.share}")

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        stacked = S.stack([update.state for update in updates])
        K = len(next(iter(stacked.values())))
        cut = math.ceil(self.share * K - 1e-9)
        if 2 * cut >= K:
            raise FedloraError(f"a trimmed mean with share {self.share} needs more than {2 * cut} clients, got {K}")
        return {name: middle(values, cut) for name, values in stacked.items()}


def squared_distances(states: list[State]) -> Tensor:
    """(K, K) of ||θ_i - θ_j||² over all tensors together; differences are taken first, so equal states are at 0."""
    flat = [value.double().flatten(1) for value in S.stack(states).values()]  # (K, numel)
    mode = "donot_use_mm_for_euclid_dist"
    return torch.stack([torch.cdist(x, x, compute_mode=mode).square() for x in flat]).sum(0)


@dataclass(frozen=True)
class Krum:
    """The mean of the `multi` updates that lie closest to the others. Blanchard et al. 2017.

    The score of an update is the sum of its K - f - 2 smallest squared distances to others, f = `byzantine` the number
    of arbitrary clients that it is to survive; K >= 2 f + 3. None: as many as K allows, (K - 3) // 2, which is none of
    three or four. Of equal scores the lower client wins.
    """

    byzantine: int | None = None
    multi: int = 1
    label: ClassVar[str] = "Krum"

    def __post_init__(self) -> None:
        if (self.byzantine or 0) < 0 or self.multi < 1:
            raise FedloraError(f"Krum needs byzantine >= 0 and multi >= 1, got {self.byzantine} and {self.multi}")

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        ordered = in_order(updates)
        K = len(ordered)
        f = max(0, (K - 3) // 2) if self.byzantine is None else self.byzantine
        if 2 * f + 3 > K:
            raise FedloraError(f"Krum with {f} byzantine needs at least {2 * f + 3} clients, got {K}")
        if self.multi > K - f:
            raise FedloraError(f"Krum can average at most {K - f} of {K} clients with {f} byzantine, not {self.multi}")
        near = squared_distances([update.state for update in ordered]).sort(dim=1).values  # the first is its own 0
        scores = near[:, 1 : K - f - 1].sum(1)
        chosen = scores.sort(stable=True).indices[: self.multi].tolist()
        return S.mean([ordered[k].state for k in chosen], [1.0] * self.multi)
