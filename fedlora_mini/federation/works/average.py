"""u_k <- keep u_k + (1 - keep) w_k: a client keeps a moving average of what it trains. IOP-FL, Jiang et al. 2023.

A site that never trained gets a model of its own without masks. Each layer is a mixture Σ_j π_lj of that layer in all
clients' averages and in the common model; its norms start as the common model's. Shares and norms are fitted to the
site's images: 10 x entropy of the prediction + 0.1 x its change under mirroring + 1e-6 x how far the foreground's
probabilities spread within windows of 21. Chapter 13.

The public code has u <- alpha u + (1 - alpha) w with alpha = 0.1: the average forgets fast; `keep` is what stays of u.
It routes by image, from the pooled input of every layer through two matrices drawn at random and a sigmoid, and fits
these by Adam at 1e-3. Here a layer has one softmax for the site, fitted at the rate 0.1: ten steps of 1e-3 would move a
logit by about 0.01 and leave π where it was. Its second view is noised and turned, ours is mirrored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.accepted import ranges
from fedlora_mini.adapters import places
from fedlora_mini.adapters.base import call
from fedlora_mini.adapters.features import in_use, statistic
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State

AVERAGE = "~average/"
WINDOW = 21  # pixels

_pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def entropy(logits: Tensor) -> Tensor:
    """-Σ_c p_c log p_c, the mean over voxels."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def spread(p: Tensor, window: int = WINDOW) -> Tensor:
    """The largest minus the smallest probability in the window around every voxel: 0 far from any boundary."""
    pool = _pool[p.dim() - 2]
    return pool(p, window, 1, window // 2) + pool(-p, window, 1, window // 2)


def unlabelled(model: nn.Module, state: State, x: Tensor) -> Tensor:
    """10 x entropy / log C + 0.1 x ||p(x) - p(mirrored x), mirrored back||² + 1e-6 x ||spread of the foreground||."""
    here, mirrored = call(model, state, x), call(model, state, x.flip(-1))
    p, q = here.softmax(1), (mirrored.flip(-1) if here.dim() > 2 else mirrored).softmax(1)
    value = 10 * entropy(here) / math.log(here.shape[1]) + 0.1 * (p - q).square().sum(1).mean()
    return value + 1e-6 * spread(p[:, 1:]).norm() if here.dim() > 2 else value  # a label has no place and no boundary


@dataclass(frozen=True)
class MovingAverage(Work):
    """The personal model is the average; the server's mean is over what was trained. u starts as the first w_k.

    At a new site: passes, Adam's steps; rate, that of π; norm_rate, that of the norms; images: at most so many of it.
    """

    keep: float = 0.1
    passes: int = 10
    rate: float = 0.1
    norm_rate: float = 1e-3
    images: int = 16

    notes = personal_notes = (AVERAGE,)

    def __post_init__(self) -> None:
        ranges(self, keep="[0, 1]", passes="[0, inf)", rate="(0, inf)", norm_rate="[0, inf)", images="[1, inf)")

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
        """Layers Σ_j π_lj and norms of its own, fitted to the site's images; the common model if no site has a u_k."""
        averages = [u for client in clients if (u := client.recall(AVERAGE))]
        if not averages:
            return state
        model, x = clients[0].setting.model, images[: self.images].to(next(iter(state.values())).device)
        norms = {path for path, module in model.named_modules() if places.norms(path, module)}
        experts = S.stack([*averages, S.pick(state, averages[0].__contains__)])  # (K + 1, …)
        paths = list(dict.fromkeys(_path(name) for name in experts if _path(name) not in norms))
        logits = torch.zeros(len(paths), len(averages) + 1, device=x.device, requires_grad=True)
        own = {n: v.clone() for n, v in state.items() if _path(n) in norms and not statistic(n)}
        optimiser = torch.optim.Adam(
            [
                {"params": [logits], "lr": self.rate},
                {"params": [v.requires_grad_() for v in own.values()], "lr": self.norm_rate},
            ]
        )

        def mixed() -> State:
            pi = dict(zip(paths, logits.softmax(1), strict=True))
            layers = {n: torch.tensordot(pi[_path(n)].to(u), u, 1) for n, u in experts.items() if _path(n) in pi}
            return state | layers | own

        with in_use(model):
            for _ in range(self.passes):
                optimiser.zero_grad()
                unlabelled(model, mixed(), x).backward()
                optimiser.step()
        return {name: value.detach() for name, value in mixed().items()}


def _path(name: str) -> str:
    """The layer that a tensor belongs to."""
    return name.rpartition(".")[0]
