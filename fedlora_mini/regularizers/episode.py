"""L(θ; x) + L(θ - α ∇L(θ; x); x̃): one step on own images shall help on the same images in another client's style.

FedDG-ELCFS, Liu et al. 2021: episodes with styles from the amplitude bank, continuous interpolation (a random share of
the way), and a contrast that keeps boundary and background features apart across styles. The inner step is first order:
no gradient flows through ∇L, whose entries are clamped as in the public code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora_mini.accepted import ranges
from fedlora_mini.chance import seeded
from fedlora_mini.data.base import IGNORE
from fedlora_mini.data.spectral import low_frequency_swap
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State

BANK = "~bank/style/"


def edge_means(z: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean features on the structures' boundary and on the background next to it: two (N, c).

    The boundary is what an erosion by one pixel takes away, the background what a dilation by two adds. Voxels with
    IGNORE are neither, and end no structure: the erosion takes them for inside, the dilation for outside.
    """
    known = (masks != IGNORE).to(z).unsqueeze(1)  # (N, 1, *S)
    solid = (masks > 0).to(z).unsqueeze(1)
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[solid.dim()]
    inner = solid * known * (1 + pool(-solid, 3, 1, 1))  # 1 - erosion where inside
    outer = (1 - solid) * pool(solid * known, 5, 1, 2)
    if z.shape[2:] != masks.shape[1:]:
        z = F.interpolate(z, masks.shape[1:], mode="nearest")
    means = [(z * w).flatten(2).sum(2) / w.flatten(2).sum(2).clamp(min=1) for w in (inner, outer)]
    return means[0], means[1]


def contrast(edges: tuple[Tensor, Tensor], styled: tuple[Tensor, Tensor], tau: float) -> Tensor:
    """NT-Xent over 2 classes x 2 styles x N images: features of one class attract, those of the other repel."""
    e = F.normalize(torch.cat([edges[0], styled[0], edges[1], styled[1]]), dim=1)  # (4N, c)
    n = len(e) // 2
    scores = e @ e.mT / tau
    own = torch.eye(2 * n, dtype=torch.bool, device=e.device)
    same = torch.block_diag(torch.ones(n, n), torch.ones(n, n)).bool().to(e.device) & ~own
    log = scores - scores.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    return -(log * same).sum(1).div(same.sum(1)).mean()


@dataclass(frozen=True)
class Episode(Regularizer):
    """inner: α. clamp: bound on the entries of ∇L. contrast: weight of the contrast, tau its temperature.

    Which style, and how far towards it, is drawn from (seed, round, step): the same numbers for all clients. The
    others' styles stand in the order of their sums, so that it is no matter who has which number.
    """

    inner: float = 1e-3
    clamp: float = 1.0
    ratio: float = 0.05
    contrast: float = 0.1
    tau: float = 0.05
    seed: int = 0

    grouped = False
    features = True

    def __post_init__(self) -> None:
        ranges(self, inner="[0, inf)", clamp="(0, inf)", ratio="[0, 0.5]", contrast="[0, inf)", tau="(0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"episodes in other styles, inner step {self.inner:g}"

    def penalty(self, state: State, context: Context) -> Tensor | float:
        if context.y.dim() == 1:
            raise FedloraError(f"'{self.label}' contrasts the two sides of an organ's boundary: it needs masks")
        bank = sorted((v for name, v in context.kept.items() if name.startswith(BANK)), key=lambda v: float(v.sum()))
        if not bank:
            return 0.0
        rng = seeded(f"episode {self.seed} {context.round} {context.step}")
        style = bank[int(torch.randint(len(bank), (), generator=rng))]
        share = torch.rand(len(context.x), *(1,) * (context.x.dim() - 1), generator=rng).to(context.x)
        x = low_frequency_swap(context.x, style.to(context.x), self.ratio, share).clamp(0, 1)
        moving = {name: state[name] for name in context.moves}
        value = segmentation_loss(context.run(state, context.x)[0], context.y).mean()
        g = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
        fast = dict(state)
        for (name, theta), each in zip(moving.items(), g, strict=True):
            fast[name] = theta if each is None else theta - self.inner * each.clamp(-self.clamp, self.clamp)
        logits, z = context.run(fast, x)
        outer = segmentation_loss(logits, context.y).mean()
        apart = contrast(edge_means(context.z, context.y), edge_means(z, context.y), self.tau)
        return outer + self.contrast * apart
