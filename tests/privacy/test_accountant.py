"""Epsilon against closed forms, against another implementation, and against numbers in print that it contradicts."""

import math

import numpy as np
import pytest
from scipy.special import comb, logsumexp

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy import ACCOUNTANTS, Release, epsilon, rdp

GRID = [(0.6, 0.01, 100), (1.0, 0.01, 1000), (1.0, 0.2, 50), (2.0, 0.05, 700), (4.0, 0.5, 20), (0.8, 1.0, 3)]


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("q", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("order", [2, 5, 32])
def test_at_whole_orders_renyi_is_a_binomial_sum(sigma, q, order):
    """sum_k C(order, k) (1-q)^(order-k) q^k exp(k (k-1) / (2 sigma^2)), Mironov et al. 2019."""
    k = np.arange(order + 1)
    terms = np.log(comb(order, k)) + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    assert rdp(order, sigma, q) == pytest.approx(logsumexp(terms) / (order - 1), rel=1e-9, abs=1e-13)


def test_without_sampling_renyi_is_half_the_order_over_sigma_squared():
    assert rdp(3.7, 2.0, 1.0) == pytest.approx(3.7 / 8)
    assert rdp(3.7, 2.0, 1 - 1e-12) == pytest.approx(3.7 / 8, rel=1e-6), "the quadrature joins it"
    assert rdp(3.7, 2.0, 0.0) == 0 and rdp(3.7, 0.0, 0.1) == math.inf


def test_renyi_grows_with_the_order_and_the_rate():
    values = [[rdp(order, 1.1, q) for order in (1.05, 1.5, 2.2, 7.9, 30.0)] for q in (0.01, 0.1, 0.9)]
    assert (np.diff(values, axis=0) > 0).all() and (np.diff(values, axis=1) > 0).all()


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_falls_with_the_noise_and_grows_with_the_number_of_releases(accountant):
    q = 0.1 if accountant in ("pld", "rdp") else 1.0  # the others know no sampling
    noises = [epsilon([Release(sigma, q, 20)], 1e-5, accountant) for sigma in (0.6, 0.9, 1.5, 4.0)]
    times = [epsilon([Release(1.2, q, steps)], 1e-5, accountant) for steps in (1, 5, 20, 100)]
    assert (np.diff(noises) < 0).all() and (np.diff(times) > 0).all()


@pytest.mark.parametrize(("sigma", "q", "steps"), GRID)
def test_it_agrees_with_dp_accounting(sigma, q, steps):
    """Renyi within 1 % of theirs on the same orders' span; the tight one within 1 % of theirs on a finer grid."""
    import dp_accounting
    from dp_accounting import pld
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
    )
    other = RdpAccountant().compose(event).get_epsilon(1e-5)
    assert epsilon([Release(sigma, q, steps)], 1e-5, "rdp") == pytest.approx(other, rel=0.01)
    finer = pld.PLDAccountant(value_discretization_interval=2e-4).compose(event).get_epsilon(1e-5)
    assert epsilon([Release(sigma, q, steps)], 1e-5) == pytest.approx(finer, rel=0.01)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_several_mechanisms_together_agree_with_dp_accounting(delta):
    import dp_accounting
    from dp_accounting import pld
    from dp_accounting.rdp import RdpAccountant

    told = [Release(0.8, 0.02, 300), Release(1.5, 0.1, 40), Release(3.0, 1.0, 2)]
    gauss = dp_accounting.GaussianDpEvent
    event = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(r.q, gauss(r.sigma)), r.times)
            for r in told
        ]
    )
    finer = pld.PLDAccountant(value_discretization_interval=2e-4).compose(event).get_epsilon(delta)
    assert epsilon(told, delta) == pytest.approx(finer, rel=0.01)
    assert epsilon(told, delta, "rdp") == pytest.approx(RdpAccountant().compose(event).get_epsilon(delta), rel=0.01)


@pytest.mark.parametrize("sigma", [0.1, 0.03, 1e-3])
def test_next_to_no_noise_is_accounted_for_and_promises_nothing(sigma):
    """On an interval that grows with the loss, rounded up: never below the exact figure of a single Gaussian.

    Beyond epsilon of about 700, where exp(-epsilon) is no number, delta is taken for the loss's tail: a little more.
    """
    exact, found = (epsilon([Release(sigma)], 1e-5, method) for method in ("gdp", "pld"))
    assert exact <= found < 1.002 * exact
    told = [Release(sigma, 0.1, 3)]
    assert epsilon([Release(sigma)], 1e-5) / 2 < epsilon(told, 1e-5) < epsilon(told, 1e-5, "rdp") < math.inf


@pytest.mark.parametrize(("sigma", "q", "steps"), GRID)
def test_the_tight_one_is_below_renyi(sigma, q, steps):
    told = [Release(sigma, q, steps)]
    assert 0 < epsilon(told, 1e-5, "pld") < epsilon(told, 1e-5, "rdp")


def test_without_sampling_all_four_are_in_order_and_the_exact_one_is_exact():
    told = [Release(2.0, 1.0, 4), Release(3.0, 1.0, 2)]
    found = {method: epsilon(told, 1e-5, method) for method in ACCOUNTANTS}
    assert found["gdp"] <= found["pld"] < found["rdp"] < found["zcdp"]
    assert found["pld"] == pytest.approx(found["gdp"], rel=2e-3)
    mu = math.sqrt(4 / 4 + 2 / 9)
    assert found["gdp"] == pytest.approx(epsilon([Release(1 / mu)], 1e-5, "gdp"))


def test_composition_does_not_depend_on_how_releases_are_grouped():
    parts = [Release(1.0, 0.05, 30), Release(2.0, 0.05, 10), Release(1.0, 0.05, 70)]
    whole = [Release(2.0, 0.05, 10), Release(1.0, 0.05, 100)]
    for method in ("pld", "rdp"):
        assert epsilon(parts, 1e-5, method) == epsilon(whole, 1e-5, method)
        assert epsilon(parts, 1e-5, method) > epsilon(whole[1:], 1e-5, method)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5) == 0 and epsilon([Release(1.0, 0.1, 0), Release(1.0, 0.0, 9)], 1e-5) == 0
    assert epsilon([Release(1.0, 0.1, 5), Release(0.0, 0.1, 1)], 1e-5) == math.inf


# Noise multipliers in print for epsilon 3, 2, 1: records of a client, delta, steps, sigma; and the epsilon that a valid
# account of them gives at batch 16, then by Renyi (chapter 17; for CIFAR-100, whose read-me has one).
PRINTED = {
    "SST-2": (67_349 / 20, 1e-5, 700, (0.36, 0.53, 1.0), (20.4, 5.7, 0.70), (24.2, 7.0, 1.09)),
    "QNLI": (104_743 / 20, 1e-5, 700, (0.23, 0.34, 0.67), (62.9, 19.0, 1.84), (76.1, 22.8, 2.67)),
    "QQP": (363_846 / 20, 1e-6, 700, (0.073, 0.11, 0.21), (636, 261, 53), (18_713, 410, 62)),
    "MNLI": (392_702 / 20, 1e-6, 700, (0.067, 0.10, 0.195), (741, 314, 63), (31_217, 783, 79)),
    "CIFAR-100": (50_000 / 8, 1e-5, 1000, (0.2,), (99,), (118,)),
}


@pytest.mark.parametrize("name", PRINTED)
def test_noise_multipliers_in_print_do_not_give_the_epsilon_in_print(name):
    records, delta, steps, sigmas, *expected = PRINTED[name]
    told = [[Release(sigma, 16 / records, steps)] for sigma in sigmas]
    found, renyi = ([epsilon(each, delta, method) for each in told] for method in ("pld", "rdp"))
    assert found == pytest.approx(expected[0], rel=0.02) and renyi == pytest.approx(expected[1], rel=0.02)
    holds = [spent <= printed for spent, printed in zip(found, (3, 2, 1), strict=False)]
    assert holds == ([False, False, True] if name == "SST-2" else [False] * len(sigmas))


def test_one_step_alone_can_be_over_budget():
    """MNLI, printed sigma 0.195 for epsilon 1 at delta 1e-6: delta(1) of a single release is 6.6e-4."""
    q = 16 / (392_702 / 20)
    assert epsilon([Release(0.195, q)], 1e-6) > 1
    assert epsilon([Release(0.195, q)], 7e-4) < 1 < epsilon([Release(0.195, q)], 6e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Release(-1.0), "sigma must be at least 0"),
        (lambda: Release(float("nan")), "sigma must be at least 0"),
        (lambda: Release(1.0, 1.5), r"q must be in \[0, 1\]"),
        (lambda: Release(1.0, 0.5, -2), "at least 0"),
        (lambda: epsilon([], 0.0), r"delta must be in \(0, 1\)"),
        (lambda: epsilon([], 1e-5, "prv"), "unknown accountant 'prv'; accepted: gdp, pld, rdp, zcdp"),
        (lambda: epsilon([Release(1.0, 0.5)], 1e-5, "gdp"), "needs q = 1"),
        (lambda: rdp(1.0, 1.0, 0.5), "larger than 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(FedloraError, match=message):
        call()
