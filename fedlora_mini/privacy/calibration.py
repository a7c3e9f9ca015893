"""How much noise a budget asks for: epsilon, a falling function of sigma, solved for sigma."""

import math
from collections.abc import Callable
from functools import lru_cache

from scipy.special import ndtri

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy.accountant import INTERVAL, Release
from fedlora_mini.privacy.accountant import epsilon as spent
from fedlora_mini.privacy.guess import guess

LARGEST, SMALLEST = 1e4, 0.1  # noise multipliers beyond which nobody looks
CLOSE = 5e-4  # the share of epsilon that may be left over


@lru_cache(maxsize=1024)
def calibrate(epsilon: float, delta: float, q: float, steps: int, method: str = "pld") -> float:
    """The least noise multiplier sigma, to a thousandth, with which `steps` releases at rate q stay within epsilon.

    Five digits, rounded up; the accountant has been asked about the very number that is returned. "pld" is asked once
    or twice, after a `guess` on a coarse grid has said where to look. Not below 0.1, which is returned where less would
    do: a record that is hardly ever drawn is private by that alone.

    Raises for epsilon outside (0, inf), no step, q outside (0, 1], what `epsilon` raises, and a budget that no sigma up
    to 10,000 keeps.
    """
    if not 0 < epsilon < math.inf:
        raise FedloraError(f"epsilon must be positive and finite, got {epsilon}")
    if steps < 1:
        raise FedloraError(f"calibration needs at least one step, got {steps}")
    if not 0 < q <= 1:
        raise FedloraError(f"the sampling rate q must be in (0, 1], got {q}")
    spent([], delta, method)  # raises for a bad delta or accountant

    def excess(x: float) -> float:
        return _excess(spent([Release(_up(math.exp(x)), q, steps)], delta, method), epsilon)

    def rough(x: float) -> float:
        return _excess(guess(math.exp(x), q, steps, delta, interval), epsilon)

    each = _deviation(epsilon, delta) / math.sqrt(steps)  # of the privacy loss of one release
    x, slope = -math.log(math.log1p((each / q) ** 2)) / 2, -1.0  # each = q sqrt(exp(1 / sigma^2) - 1)
    interval = max(INTERVAL, each / 20)
    if method == "pld":
        x, slope = _solve(rough, x, slope, CLOSE / 4)
    return _up(math.exp(_solve(excess, x, slope, CLOSE)[0]))


def _deviation(epsilon: float, delta: float) -> float:
    """About the mu of the Gaussian that is (epsilon, delta)-private: epsilon = mu^2 / 2 + mu z, z = Phi^-1(1 - delta).

    Many small releases together come near to one Gaussian, with the deviations of their losses added in squares.
    """
    z = -float(ndtri(delta))
    return math.sqrt(z * z + 2 * epsilon) - z


def _excess(spent: float, epsilon: float) -> float:
    """log(spent / epsilon), bounded."""
    return math.log(max(spent, 1e-9) / epsilon) if math.isfinite(spent) else 50.0


def _up(sigma: float) -> float:
    """The next number of five digits."""
    digits = 4 - math.floor(math.log10(sigma))
    return round(math.ceil(sigma * 10.0**digits * (1 - 1e-12)) / 10.0**digits, max(digits, 0))


def _solve(f: Callable[[float], float], x: float, slope: float, close: float) -> tuple[float, float]:
    """A point x with -close <= f(x) <= 0, f falling, and f's slope there: secants, halved where they leave the bracket.

    If no such point is found to 1e-4, the least x with f <= 0 that was met.
    """
    x = max(x, math.log(SMALLEST))
    low, high, value = -math.inf, math.inf, f(x)
    while not -close <= value <= 0 and not (value <= 0 and x <= math.log(SMALLEST)):
        low, high = (x, high) if value > 0 else (low, x)
        if high - low < 1e-4:
            return high, slope
        if low > math.log(LARGEST):
            raise FedloraError("no noise multiplier below 10,000 reaches this epsilon")
        step = -(value + close / 2) / slope
        then = max(x + max(-1.0, min(1.0, step)), math.log(SMALLEST))
        if not low < then < high:
            then = (low + high) / 2
        there = f(then)
        if (there - value) * (then - x) < 0:
            slope = (there - value) / (then - x)
        x, value = then, there
    return x, slope
