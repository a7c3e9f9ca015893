"""Who should share what, where sites rotate inputs or outputs: optima in closed form, then a small linear federation.

Site k needs the update ΔW_k = T_k (rho W_0 + ΔW*) R_kᵀ - rho W_0. With rho = 0, where only the task's update ΔW* sees
the site, a rotation R_k of the inputs keeps its column space, so that one B fits all sites exactly, and a rotation T_k
of the outputs keeps its row space, so that one A does. With rho = 1 the frozen layer sees the site too: then neither is
exact. Chapter 9.
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
from fedlora_mini.experiments.stats import Difference
from fedlora_mini.experiments.worlds import (
    ARMS,
    FLIP,
    QUESTIONS,
    REGIONS,
    SHIFTS,
    Penalty,
    Question,
    Table,
    adapted,
    answers,
    scored,
    train,
)
from fedlora_mini.state import State


def rotations(theta: float, shape: tuple[int, ...], d: int, generator: torch.Generator) -> Tensor:
    """exp(theta S), S skew and random: (*shape, d, d). theta is the rms of the angles: 0.3 is mild, 2 near random."""
    S = torch.randn(*shape, d, d, generator=generator, dtype=torch.float64)
    return torch.linalg.matrix_exp(theta * (S - S.mT) / math.sqrt(2 * d))


def site_updates(task: Tensor, R: Tensor, T: Tensor, frozen: Tensor, rho: float) -> Tensor:
    """ΔW_k = T_k (rho W_0 + ΔW*) R_kᵀ - rho W_0: (…, K, m, n).

    task, frozen: ΔW* and W_0, (…, m, n); R: (…, K, n, n), T: (…, K, m, m).
    """
    return T @ (rho * frozen + task).unsqueeze(-3) @ R.mT - rho * frozen.unsqueeze(-3)


def optimal_error(updates: Tensor, r: int, shared: str) -> Tensor:
    """min Σ_k ||ΔW_k - B A_k||² / Σ_k ||ΔW_k||² over one B and all A_k (`shared` "B"), or B_k A with one A ("A").

    One B: the best approximation of rank r of [ΔW_1 … ΔW_K], so its singular values from the (r+1)-th on (Eckart and
    Young 1936). One A: the same of the ΔW_k one below the other. updates: (…, K, m, n). Zero exactly where all ΔW_k
    lie in r common columns (or rows).
    """
    if shared not in ("A", "B"):
        raise unknown("shared factor", shared, ("A", "B"))
    stack = updates.transpose(-3, -2).flatten(-2) if shared == "B" else updates.flatten(-3, -2)
    energy = torch.linalg.svdvals(stack).square()
    return energy[..., r:].sum(-1) / energy.sum(-1)


def optima(
    theta: float = 0.54, rho: float = 0.0, ratio: float = 0.55, d: int = 24, r: int = 4, sites: int = 5, seed: int = 0
) -> dict[tuple[str, str], float]:
    """(shift, shared factor) -> `optimal_error` for one random square layer with ||W_0|| = ratio ||ΔW*||."""
    g = seeded(f"rotation optima:{seed}")
    frozen = torch.randn(d, d, generator=g, dtype=torch.float64)
    task = torch.randn(d, r, generator=g, dtype=torch.float64) @ torch.randn(r, d, generator=g, dtype=torch.float64)
    frozen = frozen * (ratio * task.norm() / frozen.norm())
    turns = [rotations(theta, (sites,), d, g) for _ in range(2)]
    out: dict[tuple[str, str], float] = {}
    for shift in ("appearance", "supervision"):
        R, T = (turn if on else torch.eye(d).to(turn) for turn, on in zip(turns, SHIFTS[shift], strict=True))
        updates = site_updates(task, R.expand_as(turns[0]), T.expand_as(turns[1]), frozen, rho)
        out |= {(shift, factor): float(optimal_error(updates, r, factor)) for factor in ("B", "A")}
    return out


# ---------------------------------------------------------------- a federation of two linear layers


@dataclass(frozen=True)
class Regime:
    """y = W_dec W_enc x + noise, `task` = ||ΔW*|| / ||W_0|| in both layers; who rotates what is in `SHIFTS`."""

    shift: str = "both"
    theta: float = 2.0
    rho: float = 0.0
    sites: int = 8
    samples: int = 16  # a site
    noise: float = 0.3
    d: int = 16  # width of y and between the layers
    inputs: int | None = None  # width of x, d if None
    r: int = 2
    task: float = 0.5

    def __post_init__(self) -> None:
        if self.shift not in SHIFTS:
            raise unknown("shift", self.shift, SHIFTS)
        if min(self.sites, self.samples, self.r) < 1 or self.r > min(self.d, self.width):
            raise FedloraError(f"sites, samples and r must be at least 1 and r at most d and inputs, got {self}")

    @property
    def width(self) -> int:
        return self.d if self.inputs is None else self.inputs


@dataclass(frozen=True)
class Worlds:
    """V federations of K sites with n inputs: both frozen layers, every site's true map and its data."""

    frozen: dict[str, Tensor]  # (V, 1, d, n) and (V, 1, d, d)
    truth: Tensor  # (V, K, d, n)
    x: Tensor  # (V, K, N, n)
    y: Tensor  # (V, K, N, d)


def draw_worlds(regime: Regime, count: int, seed: int = 0) -> Worlds:
    """The same `seed` gives the same layers, rotations, inputs and noise for every shift, theta and rho."""
    g, (V, K, d) = seeded(f"rotation worlds:{seed}"), (count, regime.sites, regime.d)
    widths = {"encoder": regime.width, "decoder": d}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    frozen = {region: normal(V, d, n) / math.sqrt(n) for region, n in widths.items()}
    tasks = {region: normal(V, d, regime.r) @ normal(V, regime.r, n) for region, n in widths.items()}
    turns = [rotations(regime.theta, (V, K), n, g) for n in widths.values()]  # of x, of y
    x, noise = normal(V, K, regime.samples, regime.width), regime.noise * normal(V, K, regime.samples, d)
    layers, still = {}, torch.eye(d, dtype=torch.float64).expand(V, K, d, d)
    for region, drawn, on in zip(REGIONS, turns, SHIFTS[regime.shift], strict=True):
        turn = drawn if on else torch.eye(drawn.shape[-1]).to(drawn).expand_as(drawn)
        R, T = (turn, still) if region == "encoder" else (still, turn)
        W0, task = frozen[region], tasks[region]
        size = regime.task * W0.norm(dim=(1, 2), keepdim=True) / task.norm(dim=(1, 2), keepdim=True)  # (V, 1, 1)
        layers[region] = W0[:, None] + site_updates(size * task, R, T, W0, regime.rho)
    truth = layers["decoder"] @ layers["encoder"]
    y = torch.einsum("vkni,vkoi->vkno", x, truth) + noise
    return Worlds({region: W[:, None].float() for region, W in frozen.items()}, truth.float(), x.float(), y.float())


def composed(frozen: Mapping[str, Tensor], params: State) -> Tensor:
    """(W_dec + B A)(W_enc + B A): (V, K, d, n)."""
    encoder, decoder = adapted(frozen, params)
    return decoder @ encoder


def fit(
    worlds: Worlds,
    arm: str,
    r: int,
    rounds: int = 40,
    steps: int = 5,
    lr: float = 0.05,
    seed: int = 0,
    penalty: Penalty | None = None,
) -> Tensor:
    """Every site's map after training row `arm` of the method table, all worlds and sites at once: (V, K, d, n)."""

    def loss(params: State) -> Tensor:
        y = worlds.x @ composed(worlds.frozen, params).mT  # (V, K, N, d)
        return F.mse_loss(y, worlds.y, reduction="sum") / y[0, 0].numel()

    sites, start = worlds.x.shape[1], f"rotation start:{seed}"
    return composed(worlds.frozen, train(worlds.frozen, sites, arm, r, loss, rounds, steps, lr, start, penalty))


def relative_error(worlds: Worlds, maps: Tensor) -> Table:
    """E ||ŷ - y||² / E ||y_0 - y||² of every site, y_0 by the frozen layers, without noise: (V, K).

    Inputs are N(0, I), so the expectations are squared Frobenius norms of maps: no test data. 1 is no better than not
    to train, 0 is the truth.
    """
    base = worlds.frozen["decoder"] @ worlds.frozen["encoder"]
    off, start = ((M - worlds.truth).double().square().sum((2, 3)) for M in (maps, base))
    return (off / start).numpy()


def errors(
    regime: Regime,
    arms: tuple[str, ...] = ARMS,
    count: int = 16,
    rounds: int = 40,
    lr: float | tuple[float, ...] = 0.05,
    seed: int = 0,
) -> dict[str, Table]:
    """arm -> `relative_error` on the same worlds from the same start; of a grid `lr` each arm takes its best."""

    def table(worlds: Worlds, arm: str, rate: float) -> Table:
        return relative_error(worlds, fit(worlds, arm, regime.r, rounds, lr=rate, seed=seed))

    return scored(lambda V, s: draw_worlds(regime, V, s), table, arms, count, lr, seed)


def compare(regime: Regime, questions: Mapping[str, Question] = QUESTIONS, **options: Any) -> dict[str, Difference]:
    """By how much one arm's error is below another's, for every question; `options` are those of `errors`."""
    return answers(questions, lambda shift, arms: errors(replace(regime, shift=shift), arms, **options))


def preferences(regime: Regime, **options: Any) -> dict[str, Difference]:
    """Claim I1: by how much one B is better than one A under appearance, one A better than one B under supervision.

    `interaction` is their sum: positive where the preference for a factor changes with the shift. The same worlds.
    """
    return compare(regime, FLIP, **options)
