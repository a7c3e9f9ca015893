"""What a sequence of private releases has cost: epsilon at a delta, for any mixture of subsampled Gaussians.

Four ways to count. "pld" composes the privacy loss numerically (dp-accounting; tight, rounded up): the figure that the
library reports. "rdp" is Renyi's, in the few lines that chapter 14 derives. "gdp" and "zcdp" are closed forms for
releases without sampling. Neighbours differ by one record that is there or not there. Chapter 14.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.privacy.loss import epsilon_of

ORDERS = (*np.arange(1.1, 11, 0.1).round(1), *range(11, 64), *(2.0**k for k in range(6, 13)))
INTERVAL = 1e-3  # on which "pld" rounds the loss up: epsilon grows by about (INTERVAL / the loss's deviation)^2 / 10
CELLS = 1_000_000  # of one release at most: with next to no noise the loss is large and its interval grows with it
SMALL = 0.05  # below this sigma "rdp" takes what holds without sampling: such an epsilon promises nothing anyway


@dataclass(frozen=True)
class Release:
    """`times` releases of a sum of clipped vectors with noise N(0, (sigma C)^2), each of a Poisson sample of rate q."""

    sigma: float
    q: float = 1.0
    times: int = 1

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise FedloraError(f"the noise multiplier sigma must be at least 0, got {self.sigma}")
        if not 0 <= self.q <= 1:
            raise FedloraError(f"the sampling rate q must be in [0, 1], got {self.q}")
        if self.times < 0 or self.times != int(self.times):
            raise FedloraError(f"the number of releases must be a whole number and at least 0, got {self.times}")


def rdp(order: float, sigma: float, q: float) -> float:
    """log E_{z ~ N(0, sigma^2)} [(1 - q + q exp((2z - 1) / 2 sigma^2))^order] / (order - 1), by quadrature.

    Renyi divergence of a Poisson-subsampled Gaussian for any real order > 1; Mironov, Talwar and Zhang 2019, eq. 1. The
    trapezoidal rule is exact here to rounding: the integrand is analytic in a strip of half-width pi sigma^2. Below
    SMALL the bound without sampling, order / 2 sigma^2. Raises for an order of at most 1.
    """
    return float(_rdp(np.array([order], dtype=float), sigma, q)[0])


def _rdp(orders: NDArray[np.float64], sigma: float, q: float) -> NDArray[np.float64]:
    """`rdp` of several orders, on one grid."""
    if not (orders > 1).all():
        raise FedloraError(f"a Renyi order must be larger than 1, got {orders.min():g}")
    if q == 0:
        return np.zeros(len(orders))
    if sigma == 0:
        return np.full(len(orders), math.inf)
    if q == 1 or sigma < SMALL:
        return orders / (2 * sigma**2)
    step = min(sigma / 8, sigma**2 / 2)
    z = np.arange(-12 * sigma, orders.max() + 12 * sigma, step)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    moments = logsumexp(np.outer(orders, ratio) - z**2 / (2 * sigma**2), axis=1)  # (orders,)
    moments += math.log(step / (sigma * math.sqrt(2 * math.pi)))
    return np.maximum(0.0, moments) / (orders - 1)


@lru_cache(maxsize=4096)
def _curve(sigma: float, q: float) -> NDArray[np.float64]:
    few, many = np.array(ORDERS[:-6], dtype=float), ORDERS[-6:]  # the largest reach so far that they need own grids
    return np.concatenate([_rdp(few, sigma, q), *(_rdp(np.array([order]), sigma, q) for order in many)])


def _epsilon_rdp(history: Sequence[Release], delta: float) -> float:
    """min over orders of sum rdp + log(1 - 1/order) - log(delta order) / (order - 1). Canonne, Kamath, Steinke 2020."""
    orders = np.array(ORDERS, dtype=float)
    total = np.sum([each.times * _curve(each.sigma, each.q) for each in history], axis=0)
    return max(0.0, float(np.min(total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1))))


def _epsilon_pld(history: Sequence[Release], delta: float) -> float:
    widest = max((1 / each.sigma + 20) / each.sigma for each in history)  # the loss is (z + 1 / 2 sigma) / sigma
    return epsilon_of(history, delta, max(INTERVAL, widest / CELLS))


def _mu(history: Sequence[Release], method: str) -> float:
    """sqrt(sum of times / sigma^2): the one Gaussian that all of them are together. Needs q = 1."""
    if any(each.q < 1 for each in history):
        raise FedloraError(f"'{method}' knows no sampling: it needs q = 1; use 'pld' or 'rdp'")
    return math.sqrt(sum(each.times / each.sigma**2 for each in history))


def _epsilon_gdp(history: Sequence[Release], delta: float) -> float:
    """The exact one of a Gaussian mechanism with mu = sqrt(sum 1 / sigma^2). Balle and Wang 2018; Dong et al. 2022."""
    mu = _mu(history, "gdp")

    def excess(epsilon: float) -> float:
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(norm.cdf(a) - math.exp(epsilon + norm.logcdf(b))) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, mu * mu / 2 + mu * 40, xtol=1e-12))


def _epsilon_zcdp(history: Sequence[Release], delta: float) -> float:
    """rho + 2 sqrt(rho log(1 / delta)) with rho = sum 1 / (2 sigma^2). Bun and Steinke 2016."""
    rho = _mu(history, "zcdp") ** 2 / 2
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


ACCOUNTANTS = {"pld": _epsilon_pld, "rdp": _epsilon_rdp, "gdp": _epsilon_gdp, "zcdp": _epsilon_zcdp}


def epsilon(history: Iterable[Release], delta: float, method: str = "pld") -> float:
    """The least epsilon that the accountant can prove for all releases together at this delta.

    0 if nothing was released, inf if something was without noise. Raises for delta outside (0, 1), an unknown method,
    and sampling where the method has no formula for it.
    """
    if not 0 < delta < 1:
        raise FedloraError(f"delta must be in (0, 1), got {delta}")
    if method not in ACCOUNTANTS:
        raise unknown("accountant", method, ACCOUNTANTS)
    merged: dict[tuple[float, float], int] = {}
    for each in history:
        merged[each.sigma, each.q] = merged.get((each.sigma, each.q), 0) + each.times
    told = [Release(sigma, q, times) for (sigma, q), times in sorted(merged.items()) if times and q]
    if not told:
        return 0.0
    if any(each.sigma == 0 for each in told):
        return math.inf
    return ACCOUNTANTS[method](told, delta)
