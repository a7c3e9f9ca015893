"""Σ ||ΔW_k - B A_k||² against Σ ||ΔW_k - B_k A||²: which factor the sites' own updates could have in common at rank r.

Every site trains alone (row `local`), then `optimal_error` asks of each layer what one B, or one A, would lose. How
the sites train decides the answer unless care is taken:

"common A"     LoRA as in a federation: all start from the same A and B = 0. A hardly moves, so that the updates' rows
               lie in one space because they began there: sharing A looks cheap, whatever the sites are.
"own A"        LoRA from another A at every site: the rows begin in different spaces, and sharing looks dear even
               for sites that are alike.
"dense"        every weight of the layer by gradient descent, no factors: neither side begins with anything. This is
               the measure; the others say how large their bias is.
"dense, Adam"  the same by Adam. If inputs are turned, x_k = R_k x, a gradient step is G R_kᵀ at every site and keeps
               the common column space; Adam's division of each entry does not commute with a rotation: it blurs the
               space and makes every update of higher rank.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlora_mini.adapters import freeze, keys, prepare, region, trainable
from fedlora_mini.adapters.base import matching
from fedlora_mini.adapters.ops import to_matrix
from fedlora_mini.chance import seeded
from fedlora_mini.data import Dataset, Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import unknown
from fedlora_mini.experiments.nearness.features import adapted_layers
from fedlora_mini.experiments.rotation import optimal_error
from fedlora_mini.federation import METHODS, Budget, Request, repartition
from fedlora_mini.metrics.rank import pairs
from fedlora_mini.state import State

DENSE = {"dense": ("sgd", 0.1), "dense, Adam": ("adam", 1e-3)}  # optimiser and rate
STARTS = (*DENSE, "common A", "own A")
EVEN = 1e6  # Dirichlet concentration at which every client gets the same mixture


def local_updates(
    model: nn.Module, train: Sequence[Split], budget: Budget, start: str = "dense", r: int = 4, seed: int = 0
) -> tuple[dict[str, Tensor], list[float]]:
    """path -> every site's ΔW_k as matrices (K, m, n) after `budget.steps` alone, and the sites' mean losses.

    model: a plain network with its base's weights, left as it is. `budget.lr` and `.optimiser` are for LoRA's starts.
    """
    if start not in STARTS:
        raise unknown("start", start, STARTS)
    base, model = model, deepcopy(model)
    if start in DENSE:
        freeze(model)
        for path, layer in matching(model):
            layer.weight.requires_grad_()
            if region(model, path) == "head":  # trains whole at every site, as it does beside LoRA
                layer.requires_grad_()
        budget = replace(budget, optimiser=DENSE[start][0], lr=DENSE[start][1])
    else:
        prepare(model, "lora", seed, rank=r)
    begin = trainable(model)
    engine = LocalEngine(model, METHODS["local"], keys(model, list(begin)), train, budget, seed, "sequential")
    if start == "own A":
        for member in engine.members:
            member.memory = trainable(prepare(deepcopy(base), "lora", seed + 1000 * (member.number + 1), rank=r))
    losses = [update.loss for update in engine.exchange({k: Request(1, {}) for k in engine.clients})]
    return _deltas(model, begin, list(engine.memory.values())), losses


@torch.no_grad()
def _deltas(model: nn.Module, begin: State, ends: list[State]) -> dict[str, Tensor]:
    """LoRA's products P Q, or the change of the weights themselves."""
    products = [pairs(model, end) for end in ends]
    if products[0]:
        return {path: torch.stack([P @ Q for P, Q in (own[path] for own in products)]) for path in products[0]}
    return {
        path: torch.stack([to_matrix(layer, end[f"{path}.weight"] - begin[f"{path}.weight"]) for end in ends])
        for path, layer in adapted_layers(model).items()
    }


def dealt(data: Dataset, seed: int = 0) -> Dataset:
    """All sites' images dealt anew at random, about as many to each: data without sites, the null of updates."""
    return repartition(data, len(data.sites), EVEN, seed)


def sharing_errors(updates: Tensor, r: int, seed: int = 0) -> dict[str, float]:
    """What one B ("B") and one A ("A") lose of the updates (K, m, n), each scaled to norm 1 so that all sites count.

    "own": what rank r loses with both factors at the site, the least possible. "B turned", "A turned": after random
    rotations of every update, which keep its singular values and leave the sites nothing in common: what the layer's
    shape (m, n) alone makes of it.
    """
    U = updates.double()
    U = U / U.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    s = torch.linalg.svdvals(U)
    out = {"own": float(s[:, r:].square().sum() / s.square().sum())}
    for factor, size in (("B", U.shape[1]), ("A", U.shape[2])):
        out[factor] = float(optimal_error(U, r, factor))
        rng = seeded(f"nearness turns:{seed}:{factor}")
        frames = torch.linalg.qr(torch.randn(len(U), size, s.shape[1], generator=rng, dtype=torch.float64)).Q
        out[f"{factor} turned"] = float(optimal_error(frames * s[:, None], r, "B"))  # turns of the other side cancel
    return out


def errors_of(updates: Mapping[str, Tensor], r: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """path -> `sharing_errors`."""
    return {path: sharing_errors(U, r, seed) for path, U in updates.items()}
