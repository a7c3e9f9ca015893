"""ĝ = (sum_{i in batch} c_i g_i + sigma C N(0, I)) / (q n): the gradient that a private client follows.

Abadi et al. 2016. The batch is a Poisson sample of rate q, every image of it is clipped on its own over all tensors
that move at this step, and the divisor is the expected batch, which does not tell how many came. Chapter 14.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.privacy.accountant import Release
from fedlora_mini.privacy.clip import CLIPS, clip_sum
from fedlora_mini.privacy.noise import Source, add_noise
from fedlora_mini.state import State

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, y) -> one number per image."""


@dataclass(frozen=True)
class DPSGD:
    """The numbers of the mechanism. sigma: noise multiplier; q: sampling rate; C: clipping norm, in units of gradients.

    clipping: see `clip_sum`. micro: images whose gradients are held at once; it changes memory and last bits alone.
    """

    sigma: float
    q: float
    C: float = 1.0
    clipping: str = "flat"
    micro: int = 64

    def __post_init__(self) -> None:
        Release(self.sigma, self.q)  # raises for bad ones
        if self.q == 0:
            raise FedloraError("the sampling rate q must be positive: at 0 nobody is ever drawn")
        if not self.C > 0:
            raise FedloraError(f"the clipping norm C must be positive, got {self.C}")
        if math.isinf(self.C) and self.sigma:
            raise FedloraError("without clipping (C = inf) no noise is enough: give a finite C, or sigma = 0")
        if self.clipping not in CLIPS:
            raise unknown("way to clip", self.clipping, CLIPS)
        if self.micro < 1:
            raise FedloraError(f"micro must be at least 1, got {self.micro}")

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum; 0 without noise, whatever C is."""
        return self.sigma * self.C if self.sigma else 0.0

    def gradient(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        loss: Loss,
        x: Tensor,
        y: Tensor,
        n: int,
        source: Source,
        moves: Collection[str] | None = None,
    ) -> State:
        """ĝ for a batch drawn from n images. moves: the names that move at this step, else all of `state`.

        The losses are not returned: nothing that was not noised leaves. Raises what `per_sample_gradients` raises.
        """
        total: State | None = None
        for begin in range(0, max(len(x), 1), self.micro):
            part = slice(begin, begin + self.micro)
            gradients, _ = per_sample_gradients(model, state, loss, x[part], y[part], moves)
            clipped = clip_sum(gradients, self.C, self.clipping)
            total = clipped if total is None else S.add(total, clipped)
        assert total is not None
        return S.scale(add_noise(total, self.noise_std, source), 1 / (self.q * n))


@dataclass(frozen=True)
class Guarded:
    """One client's mechanism in one round: it has n images, and draws its noise from `source`."""

    mechanism: DPSGD
    n: int
    source: Source

    def gradient(
        self, model: nn.Module, state: Mapping[str, Tensor], loss: Loss, x: Tensor, y: Tensor, moves: Collection[str]
    ) -> State:
        """ĝ of this step."""
        return self.mechanism.gradient(model, state, loss, x, y, self.n, self.source, moves)


@dataclass
class GuardedGroup:
    """Several clients in one pass: every image sees its own client's factors, every client's sum has its own noise.

    Equal to one client after the other up to rounding, with K times fewer calls. draws: the clients' batches.
    """

    members: Sequence[Guarded]
    draws: Sequence[Callable[[int], tuple[Tensor, Tensor]]]
    sizes: list[int] = field(default_factory=list)  # of this step's batches

    def batches(self, step: int) -> tuple[Tensor, Tensor]:
        """All clients' images of a step, client by client; their numbers are remembered."""
        parts = [draw(step) for draw in self.draws]
        self.sizes = [len(x) for x, _ in parts]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def gradient(
        self, model: nn.Module, state: Mapping[str, Tensor], loss: Loss, x: Tensor, y: Tensor, moves: Collection[str]
    ) -> State:
        """ĝ of this step for every client, (K, …) each; so is the state. At most `micro` images' gradients are held."""
        K, micro = len(self.members), min(each.mechanism.micro for each in self.members)
        owner = torch.arange(K).repeat_interleave(torch.tensor(self.sizes))  # (N,), client by client
        totals: dict[int, State] = {}
        for begin in range(0, max(len(x), 1), micro):
            part = slice(begin, begin + micro)
            mine = owner[part].to(x.device)
            gradients, _ = per_sample_gradients(model, state, loss, x[part], y[part], moves, mine)
            sizes = torch.bincount(owner[part], minlength=K).tolist()
            parts = {name: g.split(sizes) for name, g in gradients.items()}
            for k in (k for k in range(K) if begin == 0 or sizes[k]):
                own = self.members[k].mechanism
                clipped = clip_sum({name: rows[k] for name, rows in parts.items()}, own.C, own.clipping)
                totals[k] = S.add(totals[k], clipped) if k in totals else clipped
        out = []
        for k, each in enumerate(self.members):
            own = each.mechanism
            out.append(S.scale(add_noise(totals[k], own.noise_std, each.source), 1 / (own.q * each.n)))
        return S.stack(out)
