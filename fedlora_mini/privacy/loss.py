"""The privacy loss L = log(P(z) / Q(z)), z ~ P, of subsampled Gaussians: what is summed when releases are composed.

dp-accounting rounds, composes and converts; its curve of one release is a Python loop, which is arrays here: the same
numbers, several times faster. Chapter 14.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

if TYPE_CHECKING:
    from fedlora_mini.privacy.accountant import Release

Curve = NDArray[np.float64]


def hockey_stick(epsilons: Curve, sigma: float, q: float, removed: bool) -> Curve:
    """delta(epsilon) = E_P (1 - exp(epsilon - L))_+ of one release, both signs of epsilon, exact to rounding.

    One of P and Q is N(0, sigma^2), the other the mixture (1 - q) N(0, sigma^2) + q N(1, sigma^2); P is the mixture if
    the record is `removed`. L is monotone, so that the curve is a difference of two tails beyond the z where L = eps.
    """
    eps = epsilons if removed else -epsilons
    bounded = math.log1p(-q) if q < 1 else -math.inf  # no outcome is less likely under the mixture than by this
    inside = eps > bounded
    safe = np.where(inside, eps, bounded + 1 if q < 1 else eps)
    z = sigma * (safe + np.log(-np.expm1(bounded - safe)) - math.log(q)) + 0.5 / sigma  # L = eps, in units of sigma
    side = 1 if removed else -1
    plain, shifted = log_ndtr(-side * z), log_ndtr(-side * (z - 1 / sigma))
    mixed = np.logaddexp(bounded + plain, math.log(q) + shifted)
    p, other = (mixed, plain) if removed else (plain, mixed)
    tail = np.exp(p) - np.exp(epsilons + other)
    return np.clip(np.where(inside, tail, -np.expm1(np.minimum(epsilons, 0.0)) if removed else 0.0), 0.0, 1.0)


def falling(curve: Curve) -> Curve:
    """The least curve above this one that never rises: what rounding has dented is filled."""
    return np.maximum.accumulate(curve[::-1])[::-1]


@lru_cache(maxsize=64)
def distribution(history: "tuple[Release, ...]", interval: float) -> Any:
    """dp-accounting's distribution of the summed loss of all releases, on a grid of `interval`, rounded up."""
    first, *others = (_single(each.sigma, each.q, interval).self_compose(each.times) for each in history)
    for other in others:
        first = first.compose(other)
    return first


def epsilon_of(history: "Sequence[Release]", delta: float, interval: float) -> float:
    """The composed distribution's epsilon, over both directions: a record added, a record removed."""
    return _epsilon(tuple(history), delta, interval)


@lru_cache(maxsize=256)
def _epsilon(history: "tuple[Release, ...]", delta: float, interval: float) -> float:
    """Remembered, since all clients of a run ask for the same sums in every round."""
    return float(distribution(history, interval).get_epsilon_for_delta(delta))


def _single(sigma: float, q: float, interval: float) -> Any:
    """One release: Doroshenko et al. 2022 connect the dots of `hockey_stick`."""
    from dp_accounting.pld import privacy_loss_mechanism as mechanism
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap as connect
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    sides = []
    for kind in (mechanism.AdjacencyType.REMOVE, mechanism.AdjacencyType.ADD):
        reach = mechanism.GaussianPrivacyLoss(sigma, sampling_prob=q, adjacency_type=kind).connect_dots_bounds()
        low, high = math.floor(reach.epsilon_lower / interval), math.ceil(reach.epsilon_upper / interval)
        curve = hockey_stick(np.arange(low, high + 1) * interval, sigma, q, kind is mechanism.AdjacencyType.REMOVE)
        sides.append(connect(interval, low, high, falling(curve)))
    return PrivacyLossDistribution(*(sides if q < 1 else sides[:1]))
