"""Who should share what, where sites rotate inputs or outputs: optima in closed form, then a small linear federation.

Site k needs the update ΔW_k = T_k (rho W_0 + ΔW*) R_kᵀ - rho W_0. With rho = 0, where only the task's update ΔW* sees
the site, a rotation R_k of the inputs keeps its column space, so that one B fits all sites exactly, and a rotation T_k
of the outputs keeps its row space, so that one A does. With rho = 1 the frozen layer sees the site too: then neither is
exact. methods.md section 2.2.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.chance import seeded
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.experiments.stats import Difference, paired_difference
from fedlora_mini.federation import METHODS
from fedlora_mini.state import State

SHIFTS = {"none": (0, 0), "appearance": (1, 0), "supervision": (0, 1), "both": (1, 1)}  # of inputs, of outputs
ARMS = ("iat", "anti_iat", "fedsa", "inverse_fedsa", "fedit", "local")  # rows of the table that differ in sharing
REGIONS = ("encoder", "decoder")


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
    """y = W_dec W_enc x + noise, both layers d x d, `task` = ||ΔW*|| / ||W_0||; who rotates what is in `SHIFTS`."""

    shift: str = "both"
    theta: float = 2.0
    rho: float = 0.0
    sites: int = 8
    samples: int = 16  # a site
    noise: float = 0.3
    d: int = 16
    r: int = 2
    task: float = 0.5

    def __post_init__(self) -> None:
        if self.shift not in SHIFTS:
            raise unknown("shift", self.shift, SHIFTS)
        if min(self.sites, self.samples, self.r) < 1 or self.r > self.d:
            raise FedloraError(f"sites, samples and r must be at least 1 and r at most d, got {self}")


@dataclass(frozen=True)
class Worlds:
    """V federations of K sites: frozen layers (V, 1, d, d) each, every site's true map (V, K, d, d) and its data."""

    frozen: dict[str, Tensor]
    truth: Tensor
    x: Tensor  # (V, K, N, d)
    y: Tensor  # (V, K, N, d)


def draw_worlds(regime: Regime, count: int, seed: int = 0) -> Worlds:
    """The same `seed` gives the same layers, rotations, inputs and noise for every shift, theta and rho."""
    g, (V, K, d) = seeded(f"rotation worlds:{seed}"), (count, regime.sites, regime.d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    frozen = {region: normal(V, d, d) / math.sqrt(d) for region in REGIONS}
    tasks = {region: normal(V, d, regime.r) @ normal(V, regime.r, d) for region in REGIONS}
    turns = dict(zip(REGIONS, [rotations(regime.theta, (V, K), d, g) for _ in REGIONS], strict=True))
    x, noise = normal(V, K, regime.samples, d), regime.noise * normal(V, K, regime.samples, d)
    layers, still = {}, torch.eye(d, dtype=torch.float64).expand(V, K, d, d)
    for region, on in zip(REGIONS, SHIFTS[regime.shift], strict=True):
        turn = turns[region] if on else still
        R, T = (turn, still) if region == "encoder" else (still, turn)
        W0, task = frozen[region], tasks[region]
        size = regime.task * W0.norm(dim=(1, 2), keepdim=True) / task.norm(dim=(1, 2), keepdim=True)  # (V, 1, 1)
        layers[region] = W0[:, None] + site_updates(size * task, R, T, W0, regime.rho)
    truth = layers["decoder"] @ layers["encoder"]
    y = torch.einsum("vkni,vkoi->vkno", x, truth) + noise
    return Worlds({region: W[:, None].float() for region, W in frozen.items()}, truth.float(), x.float(), y.float())


def fit(worlds: Worlds, arm: str, r: int, rounds: int = 40, steps: int = 5, lr: float = 0.05, seed: int = 0) -> Tensor:
    """Every site's map after training, (V, K, d, d): `rounds` times `steps` full-batch steps, then a mean over sites.

    LoRA on both layers, all worlds and sites in one einsum; which factors are averaged is what row `arm` of the method
    table shares. Adam starts anew each round, its rate falls by half a cosine over all steps.
    """
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS)
    (V, K, _, d), g, total = worlds.x.shape, seeded(f"rotation start:{seed}"), rounds * steps
    params: State = {}
    for region in REGIONS:  # all sites start alike
        params[f"{region}.A"] = kaiming_uniform((V, 1, r, d), g).expand(V, K, r, d).clone().requires_grad_()
        params[f"{region}.B"] = torch.zeros(V, K, d, r, requires_grad=True)
    keys = [Key(region, factor, region, "linear") for region in REGIONS for factor in ("A", "B")]
    shared = [key.name for key in keys if METHODS[arm].shared(key)]
    optimiser = torch.optim.Adam(params.values(), lr=lr)

    def maps() -> Tensor:
        enc, dec = (worlds.frozen[region] + params[f"{region}.B"] @ params[f"{region}.A"] for region in REGIONS)
        return dec @ enc

    for step in range(total):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
        loss = (torch.einsum("vkni,vkoi->vkno", worlds.x, maps()) - worlds.y).square().mean((2, 3)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % steps == 0:
            optimiser.state.clear()
            with torch.no_grad():
                for name in shared:
                    params[name].copy_(params[name].mean(1, keepdim=True).expand_as(params[name]))
    return maps().detach()


def relative_error(worlds: Worlds, maps: Tensor) -> NDArray[np.float64]:
    """E ||ŷ - y||² / E ||y_0 - y||² of every site, y_0 by the frozen layers, without noise: (V, K).

    Inputs are N(0, I), so the expectations are squared Frobenius norms of maps: no test data. 1 is no better than not
    to train, 0 is the truth.
    """
    base = worlds.frozen["decoder"] @ worlds.frozen["encoder"]
    off, start = ((M - worlds.truth).double().square().sum((2, 3)) for M in (maps, base))
    return (off / start).numpy()


def errors(
    regime: Regime, arms: tuple[str, ...] = ARMS, count: int = 16, rounds: int = 40, lr: float = 0.05, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """arm -> `relative_error` on the same worlds from the same start: tables (worlds, sites) for `stats`."""
    worlds = draw_worlds(regime, count, seed)
    return {arm: relative_error(worlds, fit(worlds, arm, regime.r, rounds, lr=lr, seed=seed)) for arm in arms}


def preferences(regime: Regime, **options: int | float) -> dict[str, Difference]:
    """Claim I1: by how much one B is better than one A under appearance, one A better than one B under supervision.

    `interaction` is their sum: positive where the preference for a factor changes with the shift. The same worlds.
    """
    pair = ("fedsa", "inverse_fedsa")  # one A everywhere, one B everywhere
    a, s = (errors(replace(regime, shift=shift), pair, **options) for shift in ("appearance", "supervision"))  # type: ignore[arg-type]
    (a_A, a_B), (s_A, s_B) = (tuple(table[arm] for arm in pair) for table in (a, s))
    return {
        "appearance: B over A": paired_difference(a_A, a_B),
        "supervision: A over B": paired_difference(s_B, s_A),
        "interaction": paired_difference(a_A + s_B, a_B + s_A),
    }
