"""W = W_0 + w s B A + w_own s B_own A_own: how much of each branch, found without gradients. FDLoRA, Qi et al. 2024.

After the round's training the two numbers are searched on a few of the client's own images: random points around the
best one so far, the loss decides. They stay at the client, one pair for all layers, and go on from where they are.
"""

from dataclasses import dataclass

import torch

from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.base import call
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.federation.sampling import generator
from fedlora_mini.losses import task_loss
from fedlora_mini.state import State


@dataclass(frozen=True)
class Fusion(Work):
    """trials: points tried, where the numbers are now first. images: that judge them. width: of the search."""

    trials: int = 8
    images: int = 8
    width: float = 0.3

    def __post_init__(self) -> None:
        ranges(self, trials="[1, inf)", images="[1, inf)", width="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"two fusion scalars by {self.trials} trials"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        """Train, then keep of `trials` random points the pair of scalars with the least loss on own images."""
        end, loss = client.fit(round)
        mixes = [name for name in end if name.endswith(".mix")]
        if not mixes:
            raise FedloraError("a fusion needs an adapter whose branches are weighted, factors 'mix'")
        x, y = client.data.images[: self.images], client.data.masks[: self.images]
        rng = generator(client.setting.seed, round, client.number, "fusion")

        @torch.no_grad()
        def value(mix: torch.Tensor) -> float:
            seen = end | {name: mix.to(end[name]) for name in mixes}
            return float(task_loss(call(client.setting.model, seen, x), y).mean())

        best = end[mixes[0]].cpu()
        least = value(best)
        for _ in range(self.trials - 1):
            point = best + self.width * torch.randn(2, generator=rng).to(best)
            if (found := value(point)) < least:
                best, least = point, found
        return end | {name: best.to(end[name]) for name in mixes}, loss, {}
