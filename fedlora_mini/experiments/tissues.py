"""Who should share what, in a small segmentation: sites turn the channels of their images, and write other labels.

logits = H relu(mean_3x3(W x)): a 1x1 stem W, a fixed mean over 3 x 3 pixels, a 1x1 head H. The signatures of five
tissues span four of 16 channels; site k shows R_k x, R_k in SO(16), and writes tissue t as one of 12 labels, code_k(t).
The frozen network solves the task without shifts. With them a site needs W R_kᵀ and P_k H, where P_k moves row t to row
code_k(t). So ΔW_k = W R_kᵀ - W has the columns of W, and ΔH_k = P_k H - H the rows of H. Both have rank 4, hence one B
in the stem and one A in the head are exact at r = 4, although the frozen layers see the shifts. Chapter 9.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora_mini.chance import seeded
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.experiments.rotation import rotations
from fedlora_mini.experiments.stats import Difference
from fedlora_mini.experiments.worlds import (
    ARMS,
    QUESTIONS,
    SHIFTS,
    Question,
    Table,
    adapted,
    answers,
    scored,
    train,
)
from fedlora_mini.state import State

SIZE, CHANNELS, TISSUES, LABELS = 24, 16, 5, 12
BASE, TEST = 8, 4  # images that make the frozen head, and test images of a site
GRAIN = 4  # tissues are patches of about SIZE / GRAIN pixels
STRIDE = 2  # the loss sees every second pixel of every second row: neighbours share most of their 3 x 3 mean
GAIN = 6.0  # of the frozen head: e^(0.8 GAIN) outweighs the eleven other labels


@dataclass(frozen=True)
class Regime:
    """Sites turn channels by angles of rms `theta` and give `moved` of the five tissues labels of their own.

    Mild: theta 0.3, moved 2; strong, near random: theta 2, moved 5.
    """

    shift: str = "both"
    theta: float = 2.0
    moved: int = 5
    sites: int = 8
    images: int = 3  # a site
    noise: float = 0.5  # in every channel and pixel; two signatures are sqrt(2) apart
    r: int = 3

    def __post_init__(self) -> None:
        if self.shift not in SHIFTS:
            raise unknown("shift", self.shift, SHIFTS)
        if min(self.sites, self.images) < 1 or not 1 <= self.r <= LABELS or not 0 <= self.moved <= TISSUES:
            raise FedloraError(
                f"sites and images must be at least 1, r from 1 to {LABELS} and moved from 0 to {TISSUES}, got {self}"
            )


@dataclass(frozen=True)
class Worlds:
    """V federations of K sites. Pixels are columns; images are smoothed already, see `smooth`."""

    frozen: dict[str, Tensor]  # W (V, 1, C, C) and H (V, 1, L, C)
    R: Tensor  # (V, K, C, C)
    codes: Tensor  # (V, K, TISSUES): the label of each tissue
    x: Tensor  # (V, K, C, images (SIZE / STRIDE)²)
    y: Tensor  # (V, K, images (SIZE / STRIDE)²)
    test_x: Tensor  # (V, K, C, TEST SIZE²)
    test_y: Tensor  # (V, K, TEST SIZE²)


def smooth(images: Tensor) -> Tensor:
    """The mean over 3 x 3 pixels, fewer at the edge: (…, SIZE, SIZE) -> the same.

    The network takes it after its stem. The stem is linear in each pixel, so it may be taken once, of the image.
    """
    flat = images.reshape(-1, 1, *images.shape[-2:])
    return F.avg_pool2d(flat, 3, stride=1, padding=1, count_include_pad=False).view_as(images)


def columns(images: Tensor) -> Tensor:
    """(…, n, C, h, w) -> (…, C, n h w)."""
    return images.movedim(-3, -4).flatten(-3)


def anatomies(shape: tuple[int, ...], signatures: Tensor, noise: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (V, *shape, C, SIZE, SIZE), each pixel its tissue's signature plus noise, and tissues (V, *shape, …)."""
    V, shape = len(signatures), (len(signatures), *shape)
    fields = torch.randn(math.prod(shape), TISSUES, GRAIN, GRAIN, generator=g)
    tissue = F.interpolate(fields, size=(SIZE, SIZE), mode="bicubic").argmax(1).view(V, -1)
    clean = signatures.gather(1, tissue[..., None].expand(-1, -1, CHANNELS)).view(*shape, SIZE, SIZE, CHANNELS)
    noisy = clean + noise * torch.randn(clean.shape, generator=g)
    return noisy.movedim(-1, -3), tissue.view(*shape, SIZE, SIZE)


def draw_worlds(regime: Regime, count: int, seed: int = 0) -> Worlds:
    """The same `seed` gives the same frozen network, anatomies, noise, rotations and labels for every shift."""
    g, (V, K, n) = seeded(f"tissue worlds:{seed}"), (count, regime.sites, regime.images)
    simplex = torch.eye(TISSUES) - 1 / TISSUES  # corners of a regular simplex: four dimensions
    axes = torch.linalg.qr(torch.randn(V, CHANNELS, TISSUES, generator=g)).Q
    signatures = simplex @ axes.mT  # (V, TISSUES, C)
    W = torch.randn(V, CHANNELS, TISSUES, generator=g) @ signatures  # rank 4: reads what tells tissues apart
    H = _read_out(W, *anatomies((BASE,), signatures, regime.noise, g))
    images, tissue = anatomies((K, n + TEST), signatures, regime.noise, g)
    turns = rotations(regime.theta, (V, K), CHANNELS, g).float()
    new = TISSUES + torch.rand(V, K, LABELS - TISSUES, generator=g).argsort(-1)[..., :TISSUES]
    order = torch.rand(V, K, TISSUES, generator=g).argsort(-1)
    turned, relabelled = SHIFTS[regime.shift]
    R = turns if turned else torch.eye(CHANNELS).expand_as(turns)
    codes = torch.where(order < regime.moved * relabelled, new, torch.arange(TISSUES))
    x, y = smooth(images), codes.gather(-1, tissue.flatten(2)).view_as(tissue)  # R_k commutes with the mean as W does
    train_x, train_y = x[:, :, :n, :, ::STRIDE, ::STRIDE], y[:, :, :n, ::STRIDE, ::STRIDE]
    return Worlds(
        {"encoder": W[:, None], "decoder": H[:, None]},
        R,
        codes,
        R @ columns(train_x),
        train_y.flatten(2),
        R @ columns(x[:, :, n:]),
        y[:, :, n:].flatten(2),
    )


def _read_out(W: Tensor, images: Tensor, tissue: Tensor) -> Tensor:
    """H: GAIN times the least-squares map from relu(W x) to centred one-hot tissues, (V, L, C); rank 4."""
    features = (W @ columns(smooth(images))).relu()  # (V, C, pixels)
    wanted = F.pad(F.one_hot(tissue.flatten(1), TISSUES).float() - 1 / TISSUES, (0, LABELS - TISSUES))
    return GAIN * torch.linalg.lstsq(features.mT.double(), wanted.double()).solution.mT.float()


def logits(frozen: Mapping[str, Tensor], params: State, x: Tensor) -> Tensor:
    """(H + B A) relu((W + B A) x): (V, K, C, pixels) -> (V, K, L, pixels)."""
    W, H = adapted(frozen, params)
    return H @ (W @ x).relu()


def fit(worlds: Worlds, arm: str, r: int, rounds: int = 20, steps: int = 5, lr: float = 0.03, seed: int = 0) -> State:
    """Every site's factors after training row `arm` of the method table by cross-entropy, all sites at once."""

    def loss(params: State) -> Tensor:
        out = logits(worlds.frozen, params, worlds.x).flatten(0, 1)
        return F.cross_entropy(out, worlds.y.flatten(0, 1), reduction="sum") / worlds.y.shape[-1]

    sites, start = worlds.x.shape[1], f"tissue start:{seed}"
    return train(worlds.frozen, sites, arm, r, loss, rounds, steps, lr, start)


def dice(worlds: Worlds, params: State) -> Table:
    """Dice of every site on its test pixels, mean over the tissues in its own labels: (V, K). 0 for a label missed."""
    found = F.one_hot(logits(worlds.frozen, params, worlds.test_x).argmax(2), LABELS)  # (V, K, pixels, L)
    truth = F.one_hot(worlds.test_y, LABELS)
    overlap, sizes = (found * truth).sum(2), (found + truth).sum(2)  # (V, K, L)
    there = truth.any(2)
    value = (2 * overlap / sizes.clamp(min=1)).double() * there
    return (value.sum(-1) / there.sum(-1)).numpy()


def errors(
    regime: Regime,
    arms: tuple[str, ...] = ARMS,
    count: int = 6,
    rounds: int = 20,
    lr: float | tuple[float, ...] = (0.05, 0.2),
    seed: int = 0,
) -> dict[str, Table]:
    """arm -> 1 - Dice on the same worlds from the same start; of a grid `lr` each arm takes its best."""

    def table(worlds: Worlds, arm: str, rate: float) -> Table:
        return 1 - dice(worlds, fit(worlds, arm, regime.r, rounds, lr=rate, seed=seed))

    return scored(lambda V, s: draw_worlds(regime, V, s), table, arms, count, lr, seed)


def compare(regime: Regime, questions: Mapping[str, Question] = QUESTIONS, **options: Any) -> dict[str, Difference]:
    """By how much one arm's Dice is above another's, for every question; `options` are those of `errors`."""
    return answers(questions, lambda shift, arms: errors(replace(regime, shift=shift), arms, **options))
