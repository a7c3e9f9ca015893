"""Who shares what in two layers: W_0 + B A at every site of every world at once, and the questions put to the outcome.

Factors are (V worlds, K sites, …), so that one backward pass trains all of them. Which are averaged after a round is
what the arm's row of the method table shares. Used by `rotation` (linear layers) and `tissues` (segmentation).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.chance import seeded
from fedlora_mini.errors import unknown
from fedlora_mini.experiments.stats import Difference, paired_difference
from fedlora_mini.federation import METHODS
from fedlora_mini.regularizers.subspace import DRIFTS, oriented
from fedlora_mini.state import State

W = TypeVar("W")
Penalty = Callable[[State, State, State], Tensor]  # of factors, the round's start, and their mean drift since then
Table = NDArray[np.float64]  # (worlds, sites)

SHIFTS = {"none": (0, 0), "appearance": (1, 0), "supervision": (0, 1), "both": (1, 1)}  # of inputs, of outputs
ARMS = ("iat", "anti_iat", "fedsa", "inverse_fedsa", "fedit", "local")  # rows of the table that differ in sharing
REGIONS = ("encoder", "decoder")
BETA, EPS = 0.9, 1e-8  # SOR's own
TRIALS, TUNING = 3, 1000  # rates are searched on so many worlds, at the seed plus TUNING


def adapted(frozen: Mapping[str, Tensor], params: State) -> list[Tensor]:
    """W_0 + B A of encoder and decoder: (V, K, m, n) each."""
    return [frozen[region] + params[f"{region}.B"] @ params[f"{region}.A"] for region in REGIONS]


def train(
    frozen: Mapping[str, Tensor],
    sites: int,
    arm: str,
    r: int,
    loss: Callable[[State], Tensor],
    rounds: int,
    steps: int,
    lr: float,
    start: str,
    penalty: Penalty | None = None,
) -> State:
    """Both layers' factors after `rounds` times `steps` full-batch steps, each round followed by a mean over sites.

    frozen: (V, 1, m, n) each; `loss` sums over worlds and sites, which share no parameter within a round. Adam starts
    anew each round, its rate falls by half a cosine over all steps. `start` seeds A, which is equal at all sites.
    penalty: added to the loss, see `orthogonal`.
    """
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS)
    g, total, params = seeded(start), rounds * steps, State()
    for region in REGIONS:
        V, _, m, n = frozen[region].shape
        params[f"{region}.A"] = kaiming_uniform((V, 1, r, n), g).expand(V, sites, r, n).clone().requires_grad_()
        params[f"{region}.B"] = torch.zeros(V, sites, m, r, requires_grad=True)
    keys = [Key(region, factor, region, "linear") for region in REGIONS for factor in ("A", "B")]
    shared = [key.name for key in keys if METHODS[arm].shared(key)]
    optimiser = torch.optim.Adam(params.values(), lr=lr, fused=True)
    for step in range(total):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
        if step % steps == 0:
            begin = {name: value.detach().clone() for name, value in params.items()}
            drift = {name: torch.zeros_like(value) for name, value in begin.items()}
        value = loss(params) if penalty is None else loss(params) + penalty(params, begin, drift)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if penalty is not None:
            drift = {n: BETA * drift[n] + (1 - BETA) * (value.detach() - begin[n]) for n, value in params.items()}
        if (step + 1) % steps == 0:
            optimiser.state.clear()
            with torch.no_grad():
                for name in shared:
                    params[name].copy_(params[name].mean(1, keepdim=True).expand_as(params[name]))
    return {name: value.detach() for name, value in params.items()}


def orthogonal(arm: str, lam: float, away: int = 0, form: str = "exact") -> Penalty:
    """lam Σ cos²(change of W by the shared factor, by the private one's drift) over worlds, sites and both layers: SOR.

    away: the drift is that of the site so many places on. Then the term pulls on the shared factor as hard and knows
    nothing of its own site: SOR's control.
    """
    sides = {r: "B" if METHODS[arm].shared(Key(f"{r}.B", "B", r, "linear")) else "A" for r in REGIONS}

    def penalty(params: State, begin: State, drift: State) -> Tensor:
        values = []
        for region, side in sides.items():
            (B, _), (B0, A0), (_, dA) = (oriented(s, region, side) for s in (params, begin, drift))
            values.append(DRIFTS[form](B, B0, A0, dA.roll(away, 1), EPS).sum())
        return lam * torch.stack(values).sum()

    return penalty


def scored(
    draw: Callable[[int, int], W],
    table: Callable[[W, str, float], Table],
    arms: tuple[str, ...],
    count: int,
    lr: float | tuple[float, ...],
    seed: int,
) -> dict[str, Table]:
    """arm -> its table of errors on the same `count` worlds, trained at rate `lr`.

    Of a grid every arm takes the rate with the least mean error on TRIALS other worlds, which are not reported.
    """
    if isinstance(lr, tuple):
        trial, grid = draw(TRIALS, seed + TUNING), lr
        rates = {arm: min(grid, key=lambda rate: table(trial, arm, rate).mean()) for arm in arms}
    else:
        rates = dict.fromkeys(arms, lr)
    worlds = draw(count, seed)
    return {arm: table(worlds, arm, rate) for arm, rate in rates.items()}


class Question(NamedTuple):
    """Under this shift, by how much is arm `a` better than arm `b`?"""

    shift: str
    a: str
    b: str


# One A everywhere is FedSA's sharing, one B everywhere its inverse.
FLIP = {
    "appearance: B over A": Question("appearance", "inverse_fedsa", "fedsa"),
    "supervision: A over B": Question("supervision", "fedsa", "inverse_fedsa"),
}
QUESTIONS = FLIP | {
    **{f"both: IAT over {name}": Question("both", "iat", name) for name in ("anti_iat", "fedsa", "local", "fedit")},
    "none: IAT over fedit": Question("none", "iat", "fedit"),
}


def answers(
    questions: Mapping[str, Question], errors: Callable[[str, tuple[str, ...]], dict[str, Table]]
) -> dict[str, Difference]:
    """error(b) - error(a) for every question, paired over worlds and sites: positive where a is better.

    `errors(shift, arms)` gives the arms' tables. "interaction" is the sum of the two differences of `FLIP`: positive
    where the preference for a factor changes with the shift.
    """
    asked: dict[str, dict[str, None]] = {}
    for shift, a, b in questions.values():
        asked.setdefault(shift, {}).update({a: None, b: None})
    tables = {shift: errors(shift, tuple(arms)) for shift, arms in asked.items()}
    pairs = {name: (tables[q.shift][q.b], tables[q.shift][q.a]) for name, q in questions.items()}
    if FLIP.keys() <= pairs.keys():
        (a_A, a_B), (s_B, s_A) = (pairs[name] for name in FLIP)
        pairs["interaction"] = (a_A + s_B, a_B + s_A)
    return {name: paired_difference(worse, better) for name, (worse, better) in pairs.items()}
