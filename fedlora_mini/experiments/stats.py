"""Paired comparisons: the same seeds and sites in both arms, an interval for the difference, a corrected p-value."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from fedlora_mini.errors import FedloraError

LEAST_PAIRS = 6  # an exact two-sided Wilcoxon test on 5 pairs cannot go below p = 0.0625


@dataclass(frozen=True)
class Difference:
    """mean(a - b) with a 95 % interval.

    `p` is the exact Wilcoxon test's, None with fewer than LEAST_PAIRS seeds: too few for a test by seed.
    `p_bootstrap` is twice the share of bootstrap means on the smaller side of zero, at least 1 / draws.
    """

    mean: float
    low: float
    high: float
    p: float | None
    p_bootstrap: float
    seeds: int
    sites: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap(d: NDArray[np.float64], draws: int = 10_000, seed: int = 0) -> NDArray[np.float64]:
    """Means of `draws` resamples of a (seeds, sites) table: seeds are drawn, then sites within each drawn seed."""
    S, K = d.shape
    rng = np.random.default_rng(seed)
    seeds = rng.integers(S, size=(draws, S, 1))
    sites = rng.integers(K, size=(draws, S, K))
    return d[seeds, sites].mean((1, 2))


def interval(d: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval for the mean of a (seeds, sites) table."""
    low, high = np.quantile(bootstrap(d), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: NDArray[np.float64], b: NDArray[np.float64], draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """a, b: (seeds, sites), paired. Cluster bootstrap: seeds are drawn, then sites within each drawn seed.

    `p` is the exact Wilcoxon signed-rank test's on the seeds' means; verdicts take `p_bootstrap`.
    """
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise FedloraError(f"paired arms need equal (seeds, sites) tables, got {a.shape} and {b.shape}")
    d = a - b  # (S, K)
    means = bootstrap(d, draws, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    S, K = d.shape
    per_seed = d.mean(1)
    p = float(wilcoxon(per_seed).pvalue) if S >= LEAST_PAIRS and np.any(per_seed != 0) else None
    side = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return Difference(float(d.mean()), float(low), float(high), p, min(1.0, max(2 * side, 1 / draws)), S, K)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p_(i) <- max_{j <= i} min(1, (m - j + 1) p_(j)). Order of the input kept."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    out = np.empty_like(p)
    out[order] = np.maximum.accumulate(steps)
    return out.tolist()
