"""What belongs to the training of an adapter: ADAPTERS says what trains, this table what holds it in check."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from fedlora_mini.errors import unknown
from fedlora_mini.regularizers.base import Regularizer
from fedlora_mini.regularizers.budget import RankBudget
from fedlora_mini.regularizers.flat import FlatNoise
from fedlora_mini.regularizers.growth import Growth
from fedlora_mini.regularizers.mask import InputMask
from fedlora_mini.regularizers.orthogonal import Diversity, Orthogonality
from fedlora_mini.regularizers.preconditioner import Riemannian
from fedlora_mini.regularizers.sparse import L1

Terms = tuple[Regularizer, ...]


def arena(lam: float = 1e-3, **options: Any) -> Terms:
    """l1 on v by proximal steps; options as in `L1`."""
    return (L1(lam, **options),)


def sora(lam: float = 3e-4, threshold: str = "plain", weight: float = 10.0) -> Terms:
    """Adam's step on the gate, then a threshold; l1 in the loss besides."""
    return (L1.sora(lam, threshold, weight),)


def adalora(final: float = 4, gamma: float = 0.1, **options: Any) -> Terms:
    """A budget of `final` directions a layer on average, and orthogonality of B and A; options as in `RankBudget`."""
    return Orthogonality(gamma), RankBudget(final, **options)


def aroma(**options: Any) -> Terms:
    """One rank-one piece after another; options as in `Growth`."""
    return (Growth(**options),)


def prilora(**options: Any) -> Terms:
    """Half of every row of A is zeroed now and then; options as in `InputMask`."""
    return (InputMask(**options),)


def flat_lora(rho: float = 0.05, total: int | None = None, seed: int = 0) -> Terms:
    """Noise on the full weight during every step."""
    return (FlatNoise(rho, total, seed),)


def riemannian(eps: float = 1e-6) -> Terms:
    """Each factor's gradient preconditioned by the other factor."""
    return (Riemannian(eps),)


def pego(blocks: int = 2, preserve: float = 1e-3, diversify: float = 1e-3) -> Terms:
    """The rank's rows as `blocks` parallel adapters, orthogonal to W_0 and to each other."""
    return (Diversity(blocks, preserve, diversify),)


COMPANIONS: dict[str, Callable[..., Terms]] = {
    row.__name__: row for row in (arena, sora, adalora, aroma, prilora, flat_lora, riemannian, pego)
}
FURTHER: dict[str, type[Any]] = {"arena": L1, "adalora": RankBudget, "aroma": Growth, "prilora": InputMask}
"""Whose fields a row takes as further options."""


def _options(adapter: str) -> set[str]:
    """What `companions` takes for a row."""
    if adapter not in COMPANIONS:
        return set()
    own = {p.name for p in inspect.signature(COMPANIONS[adapter]).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return own | ({f.name for f in fields(FURTHER[adapter]) if f.init} if adapter in FURTHER else set())


def companions(adapter: str, **options: Any) -> Terms:
    """The regularisers that a row of ADAPTERS trains with; none for most. Raises for an option that nothing takes."""
    for name in options:
        if name not in _options(adapter):
            raise unknown(f"training option of adapter '{adapter}'", name, _options(adapter))
    return COMPANIONS[adapter](**options) if adapter in COMPANIONS else ()
