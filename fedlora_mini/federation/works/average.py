"""u_k <- keep u_k + (1 - keep) w_k: a client keeps a moving average of what it trains. Part of IOP-FL, Jiang 2023.

A site that never trained gets a mixture Σ_k π_k u_k of whole models, with π fitted to its unlabelled images: 10 x
entropy of the prediction + 0.1 x its change under mirroring. That is not yet the paper's adaptation to a new site
(methods.md 8.3). Its public code also routes layer by layer, by the image, adapts the norms and smooths shapes: all
three are absent here. Its Adam has the rate 1e-3; ten steps of that move a logit of π by about 0.01, so π would stay
1/K within 2 %. Here π is all that is fitted, at the rate 0.1.

The public code has u <- alpha u + (1 - alpha) w with alpha = 0.1: the average forgets fast. `keep` is what stays of u.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import call
from fedlora_mini.adapters.features import in_use, statistic
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State

AVERAGE = "~average/"


def entropy(logits: Tensor) -> Tensor:
    """-Σ_c p_c log p_c, the mean over voxels."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def unlabelled(model: nn.Module, state: State, x: Tensor) -> Tensor:
    """What π is fitted by: 10 x entropy + 0.1 x ||p(x) - p(mirrored x), mirrored back||²."""
    here, mirrored = call(model, state, x), call(model, state, x.flip(-1)).flip(-1)
    return 10 * entropy(here) + 0.1 * (here.softmax(1) - mirrored.softmax(1)).square().sum(1).mean()


@dataclass(frozen=True)
class MovingAverage(Work):
    """The personal model is the average; the server's mean is over what was trained. u starts as the first w_k.

    passes, rate: Adam's steps and rate for π at a new site, images: at most so many of it.
    """

    keep: float = 0.1
    passes: int = 10
    rate: float = 0.1
    images: int = 16

    notes = personal_notes = (AVERAGE,)

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"moving average of the client's models, keep {self.keep:g}"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        end, loss = client.fit(round)
        u = client.recall(AVERAGE)
        client.keep(AVERAGE, S.add(S.scale(u, self.keep), end, 1 - self.keep) if u else end)
        return end, loss, {}

    def personal(self, state: State, client: Member) -> State:
        return state | client.recall(AVERAGE)

    def newcomer(self, state: State, clients: Sequence[Member], images: Tensor) -> State:
        """Σ_k π_k u_k, with π fitted to the site's images without masks; the common model if no site has a u_k."""
        averages = [u for client in clients if (u := client.recall(AVERAGE))]
        if not averages:
            return state
        stacked = S.stack(averages)  # (K, …)
        model, x = clients[0].setting.model, images[: self.images].to(next(iter(state.values())).device)
        logits = torch.zeros(len(averages), device=x.device, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=self.rate)

        def mixed() -> State:
            pi = logits.softmax(0)  # (K,)
            shares = {name: pi.detach() if statistic(name) else pi for name in stacked}  # statistics have no gradient
            return state | {name: torch.tensordot(shares[name].to(u), u, 1) for name, u in stacked.items()}

        with in_use(model):
            for _ in range(self.passes):
                optimiser.zero_grad()
                unlabelled(model, mixed(), x).backward()
                optimiser.step()
        return {name: value.detach() for name, value in mixed().items()}
