"""Lower bounds: right where the truth is known, below it with the promised confidence, near it with many games."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy import Release, calibrate, epsilon
from fedlora_mini.privacy.audit import (
    ceiling,
    chance_of,
    gaussian_bound,
    gaussian_ceiling,
    lower_bound,
    one_run_bound,
    release_ceiling,
)


def randomised_response(eps, n, rng):
    """(secret bits, answers): the truth with chance e^eps / (1 + e^eps), which is exactly eps-private."""
    bits = rng.integers(0, 2, n)
    return bits, np.where(rng.random(n) < 1 / (1 + math.exp(-eps)), bits, 1 - bits)


@pytest.mark.parametrize("eps", [0.5, 1.0, 3.0])
def test_both_bounds_come_near_randomised_response_from_below(eps):
    bits, told = randomised_response(eps, 20_000, np.random.default_rng(0))
    members, strangers = bits == 1, bits == 0
    many = lower_bound(
        int(told[members].sum()), int(members.sum()), int(told[strangers].sum()), int(strangers.sum()), confidence=0.99
    )
    one = one_run_bound(int((told == bits).sum()), len(bits), len(bits), confidence=0.99)
    assert 0.85 * eps < many <= eps and 0.9 * eps < one <= eps


@pytest.mark.parametrize("kind", ["many runs", "one run"])
def test_the_truth_is_exceeded_no_more_often_than_promised(kind):
    rng, eps, above = np.random.default_rng(1), 1.0, 0
    for _ in range(400):
        bits, told = randomised_response(eps, 200, rng)
        if kind == "one run":
            found = one_run_bound(int((told == bits).sum()), 200, 200, confidence=0.9)
        else:
            n = int(bits.sum())
            found = lower_bound(int(told[bits == 1].sum()), n, int(told[bits == 0].sum()), 200 - n, confidence=0.9)
        above += found > eps
    assert above / 400 < 0.1 + 3 * math.sqrt(0.09 / 400)


def test_an_attack_on_a_gaussian_stays_below_the_exact_epsilon():
    sigma, n, delta, rng = 0.8, 100_000, 1e-5, np.random.default_rng(2)
    exact = epsilon([Release(sigma)], delta, "gdp")
    z = rng.standard_normal((2, n)) * sigma
    for threshold in (0.5, 1.5, 2.5):
        hits, alarms = int((z[0] + 1 > threshold).sum()), int((z[1] > threshold).sum())
        assert lower_bound(hits, n, alarms, n, delta) < exact
    far = 0.5 + 3 * sigma  # few alarms
    found = lower_bound(int((z[0] + 1 > far).sum()), n, int((z[1] > far).sum()), n, delta)
    assert found > 0.5 * exact > 0 and norm.sf(far / sigma) < 1e-3


def test_without_noise_epsilon_grows_with_the_number_of_games():
    found = [lower_bound(n, n, 0, n) for n in (10, 100, 1000)]
    assert found[2] > found[1] + 2 > found[0] + 4 > 4.8
    assert one_run_bound(1000, 1000, 1000) > 5


def test_guessing_rules_out_nothing():
    assert lower_bound(50, 100, 50, 100) == 0 and one_run_bound(50, 100, 100) == 0
    assert lower_bound(0, 10, 0, 10) < 0.6


def test_silence_helps_and_delta_costs():
    assert one_run_bound(100, 100, 1000) > one_run_bound(550, 1000, 1000)
    assert one_run_bound(95, 100, 100, delta=1e-4) < one_run_bound(95, 100, 100)
    assert chance_of(95, 100, 100, 1.0, 1e-4) > chance_of(95, 100, 100, 1.0)


def test_the_chance_is_the_papers_sum_written_as_a_loop():
    from scipy.stats import binom

    v, r, m, eps, delta = 37, 50, 80, 0.7, 1e-3
    q, largest = 1 / (1 + math.exp(-eps)), 0.0
    for i in range(1, v + 1):
        within = sum(binom.pmf(k, r, q) for k in range(v - i, v))
        largest = max(largest, within / i)
    expected = sum(binom.pmf(k, r, q) for k in range(v, r + 1)) + 2 * m * delta * largest
    assert chance_of(v, r, m, eps, delta) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lower_bound(11, 10, 0, 10), "hits"),
        (lambda: lower_bound(1, 10, 0, 0), "alarms"),
        (lambda: lower_bound(1, 10, 0, 10, confidence=1.0), "confidence"),
        (lambda: one_run_bound(6, 5, 10), "correct <= guesses"),
    ],
)
def test_bad_counts_are_named(call, message):
    with pytest.raises(FedloraError, match=message):
        call()


@pytest.mark.parametrize(("eps", "delta"), [(0.5, 0.0), (1.0, 1e-2), (3.0, 1e-5)])
def test_no_attack_on_a_gaussian_is_above_the_ceiling_of_its_epsilon_and_one_touches_it(eps, delta):
    fpr = np.linspace(0, 1, 2001)
    assert (np.diff(ceiling(fpr, eps, delta)) >= 0).all() and ceiling(1.0, eps, delta) == 1
    if not delta:
        told = np.array([0.0, 1 / (1 + math.exp(eps)), 1.0])  # randomised response reaches it
        assert ceiling(told, eps) == pytest.approx([0, 1 / (1 + math.exp(-eps)), 1])
        return
    mu = 1 / calibrate(eps, delta, 1.0, 1, "gdp")
    fine = norm.cdf(np.linspace(-8, 8, 20_001))
    gap = ceiling(fine, eps, delta) - gaussian_ceiling(fine, mu)
    assert -1e-6 < gap.min() < 1e-4


def test_the_gaussian_bound_comes_near_the_truth_where_the_other_does_not():
    sigma, n, rng = 1.5, 4000, np.random.default_rng(3)
    z = rng.standard_normal((2, n)) * sigma
    hits, alarms = int((z[0] + 1 > 0.5).sum()), int((z[1] > 0.5).sum())
    mu = gaussian_bound(hits, n, alarms, n)
    exact, found = (epsilon([Release(s)], 1e-5, "gdp") for s in (sigma, 1 / mu))
    assert 0.8 * exact < found < exact and lower_bound(hits, n, alarms, n, 1e-5) < 0.4 * exact


def test_the_gaussian_bound_exceeds_the_truth_no_more_often_than_promised():
    rng, above, n = np.random.default_rng(4), 0, 300
    for _ in range(400):
        hits, alarms = (int((rng.standard_normal(n) + shift > 0.3).sum()) for shift in (0.7, 0.0))
        above += gaussian_bound(hits, n, alarms, n, 0.9) > 0.7
    assert above / 400 < 0.1 + 3 * math.sqrt(0.09 / 400)


def test_counts_that_say_nothing_give_no_bound():
    assert gaussian_bound(0, 10, 0, 10) == 0 == gaussian_bound(10, 10, 10, 10) == gaussian_bound(5, 10, 6, 10)


def test_the_ceiling_of_no_release_is_a_guess_and_without_noise_to_be_drawn_is_to_be_seen():
    fpr = np.array([0.0, 0.1, 0.7, 1.0])
    assert np.array_equal(release_ceiling(fpr, Release(1.0, 0.5, 0)), fpr)
    assert np.array_equal(release_ceiling(fpr, Release(1.0, 0.0, 5)), fpr)
    assert np.array_equal(release_ceiling(fpr, Release(0.0, 1.0, 5)), np.ones(4))
    exact = release_ceiling(fpr, Release(0.0, 0.5, 2))
    assert exact == pytest.approx(0.75 + 0.25 * fpr)
    hardly = release_ceiling(fpr, Release(1e-2, 0.5, 2))
    assert (hardly >= exact - 1e-9).all() and hardly == pytest.approx(exact, abs=0.03)
