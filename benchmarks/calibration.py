"""How long does it take to find the noise multiplier of a budget?"""

import math
import warnings

import dp_accounting
from dp_accounting import pld
from dp_accounting.pld import privacy_loss_distribution as distributions
from scipy.optimize import brentq
from timing import Row, compare, main

from fedlora_mini.privacy import accountant, calibrate, loss

warnings.filterwarnings("ignore")
SETTINGS = [(3.0, 1e-5, 0.05, 400), (1.0, 1e-5, 0.33, 24), (8.0, 1e-5, 0.1, 64), (3.0, 1e-5, 0.01, 1000)]
SETTINGS += [(3.0, 1e-6, 8.1e-4, 700), (20.0, 1e-6, 8e-4, 70)]  # little noise, rarely drawn: the widest losses
INTERVAL = accountant.INTERVAL


def ours(method: str, setting: tuple):
    """Nothing is remembered from call to call."""

    def act() -> float:
        for remembered in (calibrate, loss.distribution, loss._epsilon, accountant._curve):
            remembered.cache_clear()
        return calibrate(*setting, method)

    return act


def plain_search(epsilon: float, delta: float, q: float, steps: int):
    """A root finder on the library's own figure, on the same grid: what this package did before."""

    def excess(x: float) -> float:
        one = distributions.from_gaussian_mechanism(
            math.exp(x), sampling_prob=q, value_discretization_interval=INTERVAL
        )
        return math.log(one.self_compose(steps).get_epsilon_for_delta(delta) / epsilon)

    def act() -> float:
        low = high = math.log(max(0.3, q * math.sqrt(steps) / epsilon))
        while excess(low) < 0:
            low -= 0.5
        while excess(high) > 0:
            high += 0.5
        return math.exp(brentq(excess, low, high, xtol=2e-4))

    return act


def by_dp_accounting(epsilon: float, delta: float, q: float, steps: int):
    def event(sigma: float):
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
        )

    return lambda: dp_accounting.calibrate_dp_mechanism(
        lambda: pld.PLDAccountant(value_discretization_interval=INTERVAL), event, epsilon, delta, tol=1e-3
    )


def measure() -> list[Row]:
    """How long does it take to find the noise multiplier of a budget?"""
    rows = []
    for setting in SETTINGS:
        epsilon, delta, q, steps = setting
        arms = {
            "ours": ours("pld", setting),
            "ours, Renyi": ours("rdp", setting),
            "a root finder on dp-accounting": plain_search(*setting),
            "dp-accounting's calibration": by_dp_accounting(*setting),
        }
        rows += compare(
            f"epsilon {epsilon:g}, delta {delta:g}, q {q:g}, {steps} steps",
            "a root finder on dp-accounting",
            arms,
            rounds=3,
        )
    return rows


if __name__ == "__main__":
    main(measure)
