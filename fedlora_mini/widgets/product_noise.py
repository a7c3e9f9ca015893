"""Noise in B A as a picture: the energies of N_B A, B N_A and N_B N_A after K steps of four schedules, and one entry.

Closed forms alone, nothing is drawn by chance: `metrics.noise` is where they come from.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import traitlets as t

from fedlora_mini.metrics.noise import NoiseEnergy, expected_energy, noisy_steps

from .base import PageWidget, load

M, N, RANKS = 64, 64, (2, 4, 8, 16, 32)  # the layer; the ranks of the slider
ARMS = {  # name -> schedule, share of the K steps, factor on σ
    "K steps of both": ("simultaneous", 1.0, 1.0),
    "K alternating": ("alternating", 1.0, 1.0),
    "K/2 of both": ("simultaneous", 0.5, 1.0),
    "K/2 of both, σ/√2": ("simultaneous", 0.5, math.sqrt(0.5)),  # half as many releases: the same privacy with less
}


def product_density(z: Sequence[float] | np.ndarray, rank: int) -> np.ndarray:
    r"""Density at z of $\frac1{\sqrt r}\sum_{l=1}^r x_ly_l$ with standard normal $x,y$, for even r. Its variance is 1.

    The sum's own is $e^{-|x|}\,\theta_n(|x|)/(2^{n+1}n!)$ with $n=\frac r2-1$, $\theta_0=1$, $\theta_1=x+1$ and
    $\theta_n=(2n-1)\theta_{n-1}+x^2\theta_{n-2}$, the reverse Bessel polynomials. r = 2 is Laplace's distribution.
    """
    x, n = math.sqrt(rank) * np.abs(np.asarray(z, dtype=float)), rank // 2 - 1
    before, now = np.ones_like(x), np.ones_like(x) if n == 0 else x + 1
    for k in range(2, n + 1):
        before, now = now, (2 * k - 1) * now + x**2 * before
    return math.sqrt(rank) * np.exp(-x) * now / (2 ** (n + 1) * math.factorial(n))


def _factor(rows: int, columns: int, norm: float) -> torch.Tensor:
    """A matrix with this Frobenius norm; the energies ask for nothing else of it."""
    return torch.full((rows, columns), norm / math.sqrt(rows * columns), dtype=torch.float64)


class ProductNoise(PageWidget):
    """What K noisy steps leave in B A, by term, for four schedules.

    >>> w = ProductNoise(steps=20)
    >>> round(w.result["total"]["K alternating"] / w.result["total"]["K/2 of both"], 6)
    1.0
    """

    _esm = load("product_noise.js")

    sigma_B = t.Float(0.03, min=0.0, max=1.0, help="std of one step's noise on an entry of B").tag(sync=True)
    sigma_A = t.Float(0.03, min=0.0, max=1.0, help="std of one step's noise on an entry of A").tag(sync=True)
    norm_B = t.Float(1.5, min=0.0, max=100.0, help="Frobenius norm of B").tag(sync=True)
    norm_A = t.Float(1.5, min=0.0, max=100.0, help="Frobenius norm of A").tag(sync=True)
    rank = t.Int(8, help="rank r, one of RANKS").tag(sync=True)
    steps = t.Int(20, min=2, max=400, help="local steps K, even").tag(sync=True)

    @t.validate("sigma_B", "sigma_A", "norm_B", "norm_A")
    def _finite(self, proposal: Any) -> Any:
        if not np.isfinite(proposal["value"]):
            raise t.TraitError(f"{proposal['trait'].name} must be finite, got {proposal['value']}")
        return proposal["value"]

    @t.validate("rank", "steps")
    def _accepted(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "rank" and value not in RANKS:
            raise t.TraitError(f"rank must be one of {', '.join(map(str, RANKS))}, got {value}")
        if name == "steps" and value % 2:
            raise t.TraitError(f"steps must be even, to have a half, got {value}")
        return value

    def energy(self, arm: str) -> NoiseEnergy:
        """The expected energies of one of `ARMS`."""
        schedule, share, factor = ARMS[arm]
        B, A = _factor(M, self.rank, self.norm_B), _factor(self.rank, N, self.norm_A)
        counts = noisy_steps(schedule, round(share * self.steps))
        return expected_energy(B, A, factor * self.sigma_B, factor * self.sigma_A, counts)

    @property
    def result(self) -> dict[str, Any]:
        """The numbers that the picture shows, by arm: `terms` (N_B A, B N_A, N_B N_A), `total`, `snr`; `signal`.

        signal: ||B||² ||A||² / r, the mean of ||B A||² over random orientations; snr: signal / total.
        """
        energies = {arm: self.energy(arm) for arm in ARMS}
        signal = self.norm_B**2 * self.norm_A**2 / self.rank
        return {
            "signal": signal,
            "terms": {arm: [e.from_B, e.from_A, e.product] for arm, e in energies.items()},
            "total": {arm: e.total for arm, e in energies.items()},
            "snr": {arm: signal / e.total if e.total else math.inf for arm, e in energies.items()},
            "density": product_density(np.linspace(-5, 5, 41), self.rank),
        }

    def summary(self) -> str:
        totals = ", ".join(f"{arm} {e:.3g}" for arm, e in self.result["total"].items())
        return (
            f"Noise in BA at σ_B = {self.sigma_B:g}, σ_A = {self.sigma_A:g}, r = {self.rank}, K = {self.steps}: "
            f"{totals}. (The live picture needs JavaScript.)"
        )
