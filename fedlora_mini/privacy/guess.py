"""epsilon of many equal releases in a millisecond: where to look for sigma, before the accountant decides.

The accountant's own steps (`loss`) on a coarser grid, for a removed record alone, without bounds on what is cut off.
"""

import math

import numpy as np
from scipy import fft

from fedlora_mini.privacy.loss import hockey_stick

REACH = 8.0  # standard deviations, beyond which nothing is looked at: a share of 1e-15
LARGEST = 700.0  # loss whose exponential is still a number
CELLS = 10**5  # of the grid of one release, at most


def guess(sigma: float, q: float, times: int, delta: float, interval: float) -> float:
    """About epsilon(delta) of `times` releases on a grid of `interval`; inf where the loss leaves all bounds.

    One release's curve delta(eps) is joined by straight lines in exp(eps), whose slopes give the loss's masses; a power
    of their transform composes them. Too large by (interval / the loss's deviation)^2 / 15, less where 1 / q is large.
    """
    bounded = math.log1p(-q) if q < 1 else -math.inf
    shift = 0.0 if q < 1 else 1 / sigma  # the mixture's smaller mean, in units of sigma
    low, high = (
        np.logaddexp(bounded, math.log(q) + z / sigma - 0.5 / sigma**2) for z in (shift - REACH, 1 / sigma + REACH)
    )
    if high > LARGEST:
        return math.inf
    interval = max(interval, (high - low) / CELLS)
    first = math.floor(low / interval) - 1
    eps = np.arange(first, math.ceil(high / interval) + 1) * interval
    curve = hockey_stick(eps, sigma, q, removed=True)
    slopes = np.append(np.diff(curve) / np.diff(np.exp(eps)), 0.0)  # -sum of p exp(-L) beyond each point
    p = np.exp(eps) * np.diff(slopes, prepend=0.0)
    p[0] = 1 - p[1:].sum()

    mean = p @ eps
    half = REACH * math.sqrt(times * (p @ eps**2 - mean**2)) + high
    n = fft.next_fast_len(max(len(p), math.ceil(2 * half / interval)), real=True)
    start = max(math.floor((times * mean - half) / interval), times * first)
    summed = np.roll(fft.irfft(fft.rfft(p, n) ** times, n), times * first - start)
    return _epsilon(summed, (start + np.arange(n)) * interval, delta)


def _epsilon(p: np.ndarray, loss: np.ndarray, delta: float) -> float:
    """The least eps >= 0 with sum over loss > eps of p (1 - exp(eps - loss)) <= delta."""
    inside = (loss >= 0) & (loss <= LARGEST)
    never, p, loss = p[loss > LARGEST].sum(), p[inside], loss[inside]
    mass = np.cumsum(p[::-1])[::-1] + never  # at and beyond each loss
    scaled = np.cumsum((p * np.exp(-loss))[::-1])[::-1]
    k = int(np.searchsorted(np.exp(loss) * scaled - mass, -delta))  # the first loss that is large enough
    if k == len(p):
        return math.inf if never > delta else 0.0
    return max(0.0, math.log((mass[k] - delta) / scaled[k])) if mass[k] > delta else 0.0
