"""Simulated sites: site k of seed s shows (Appearance) and draws (Supervision) the same anatomy its own way.

The 2x2 of the experiments is two strengths: (0, 0) none, (a, 0) appearance, (0, b) supervision, (a, b) both.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.data.appearance import Appearance, apply_appearance
from fedlora_mini.data.seeds import generator
from fedlora_mini.data.supervision import Supervision, apply_supervision, signed_distance
from fedlora_mini.errors import FedloraError, unknown

__all__ = [
    "Appearance",
    "Supervision",
    "apply_appearance",
    "apply_supervision",
    "as_shift",
    "random_appearance",
    "signed_distance",
    "site_appearance",
    "site_shifts",
    "site_supervision",
]


UNSEEN = 1000  # unseen site j has index UNSEEN + j: it stays the same whatever the number of training sites


def site_shifts(
    seed: int, n_sites: int, n_unseen: int, appearance: Any, supervision: Any
) -> list[tuple[int, Appearance, Supervision]]:
    """(index, look, rule) of every site, unseen ones last.

    appearance, supervision: one value for all sites or a list with one for each; a value is what `as_shift` takes.
    """
    indices = [*range(n_sites), *(UNSEEN + j for j in range(n_unseen))]
    looks = _one_each("appearance", appearance, len(indices))
    rules = _one_each("supervision", supervision, len(indices))
    return [
        (
            k,
            as_shift(Appearance, look, site_appearance(seed, k)),
            as_shift(Supervision, rule, site_supervision(seed, k)),
        )
        for k, look, rule in zip(indices, looks, rules, strict=True)
    ]


def site_appearance(seed: int, index: int) -> Appearance:
    """Site `index` of a simulated federation at strength 1: one of every four is inverted, the rest is spread out."""
    gamma, invert, bias, angle, smooth, noise, low, style = _spread(seed, index, 8, purpose=1)
    return Appearance(
        gamma=2.2 ** (2 * gamma - 1),
        invert=1.0 if invert < 0.25 else 0.0,
        bias=0.6 * bias,
        bias_angle=2 * math.pi * angle,
        blur=1.2 * smooth**2,
        noise=0.08 * noise,
        low_frequency=0.5 * low,
        style=int(1000 * style),
    )


def site_supervision(seed: int, index: int) -> Supervision:
    """Site `index` of a simulated federation at strength 1: outlines move by -1.4..2 px, walls are in or out."""
    grow, rim, threshold = _spread(seed, index, 3, purpose=2)
    return Supervision(grow=3.4 * grow - 1.4, rim=1.0 if rim < 0.5 else 0.0, threshold=0.15 + 0.7 * threshold)


def random_appearance(n: int, rng: torch.Generator) -> Appearance:
    """One appearance for every image, wider than any site's: for pre-training that should meet every site half way."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    return Appearance(
        gamma=2.5 ** uniform(-1, 1),
        invert=(uniform(0, 1) < 0.4).float(),
        bias=uniform(0, 0.7),
        bias_angle=uniform(0, 2 * math.pi),
        blur=1.5 * uniform(0, 1) ** 2,
        noise=uniform(0, 0.1),
        low_frequency=uniform(0, 0.6),
        style=int(torch.randint(0, 1000, (1,), generator=rng)),
    )


def as_shift(kind: type, value: Any, default: Any) -> Any:
    """A shift from a number (that strength of `default`), a mapping of knobs, or a ready Appearance/Supervision."""
    if isinstance(value, kind):
        return value
    if isinstance(value, dict):
        names = [f.name for f in fields(kind)]
        for key in value:
            if key not in names:
                raise unknown(f"{kind.__name__.lower()} knob", key, names)
        return kind(**value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return default.scaled(float(value))
    raise FedloraError(
        f"{kind.__name__.lower()} takes a strength (0 = none), a mapping of knobs or {kind.__name__}(), got {value!r}"
    )


def _one_each(name: str, value: Any, total: int) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) != total:
            raise FedloraError(f"{name} lists {len(value)} sites, but there are {total} (the unseen ones come last)")
        return list(value)
    return [value] * total


def _spread(seed: int, index: int, knobs: int, purpose: int) -> list[float]:
    """A Latin hypercube over every four consecutive sites: u = (stratum + jitter) / 4, strata permuted for each knob.

    Plain independent draws would often give four sites with nearly the same shift. Depends on (seed, index) alone.
    """
    block, place = divmod(index, 4)
    rng = generator(seed, purpose, block)
    values = []
    for _ in range(knobs):
        strata, jitter = torch.randperm(4, generator=rng), torch.rand(4, generator=rng, dtype=torch.float64)
        values.append(float((strata[place] + jitter[place]) / 4))
    return values
