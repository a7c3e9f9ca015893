"""The noise that a budget asks for: never too little, hardly too much, and the same as others would find."""

import math

import pytest

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy import Release, calibrate, epsilon
from fedlora_mini.privacy import calibration as module
from fedlora_mini.privacy.guess import guess

GRID = [  # epsilon, delta, q, steps
    (0.5, 1e-5, 0.05, 400),
    (3.0, 1e-5, 0.05, 400),
    (8.0, 1e-5, 0.05, 400),
    (1.0, 1e-5, 0.33, 24),
    (3.0, 1e-5, 1.0, 10),
    (1.0, 1e-6, 0.002, 5000),
    (0.1, 1e-5, 0.01, 10),
    (0.01, 1e-3, 0.5, 3),
    (20.0, 1e-6, 8e-4, 70),
    (1.0, 0.4, 0.1, 10),
    (1.0, 1e-6, 1e-3, 1),
]


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize(("target", "delta", "q", "steps"), GRID)
def test_the_budget_is_spent_and_no_more(target, delta, q, steps, method):
    sigma = calibrate(target, delta, q, steps, method)
    assert 0.997 * target < epsilon([Release(sigma, q, steps)], delta, method) <= target


@pytest.mark.parametrize(("target", "delta", "q", "steps"), GRID[:5:2])
def test_it_agrees_with_dp_accounting_within_one_percent(target, delta, q, steps):
    import dp_accounting
    from dp_accounting import pld

    def event(sigma):
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
        )

    theirs = dp_accounting.calibrate_dp_mechanism(
        lambda: pld.PLDAccountant(value_discretization_interval=1e-3), event, target, delta, tol=1e-3
    )
    assert calibrate(target, delta, q, steps) == pytest.approx(theirs, rel=0.01)


def test_more_budget_needs_less_noise_and_more_steps_need_more():
    by_epsilon = [calibrate(target, 1e-5, 0.1, 64) for target in (1.0, 2.0, 4.0)]
    by_steps = [calibrate(2.0, 1e-5, 0.1, steps) for steps in (16, 64, 256)]
    assert by_epsilon == sorted(by_epsilon, reverse=True) and by_steps == sorted(by_steps)


def test_without_sampling_the_closed_form_is_met():
    assert calibrate(1.0, 1e-5, 1.0, 9, "gdp") == pytest.approx(3 * calibrate(1.0, 1e-5, 1.0, 1, "gdp"), rel=1e-3)


def test_a_tight_account_is_asked_few_times(monkeypatch):
    """The fine grid is what costs: one question to it, seldom two, whatever the budget."""
    asked = []
    monkeypatch.setattr(module, "spent", lambda *args: (asked.append(1), epsilon(*args))[1])
    for target, delta, q, steps in GRID[:6]:
        asked.clear()
        calibrate.__wrapped__(target, delta, q, steps)
        assert len(asked) <= 3, (target, delta, q, steps)  # the first is about delta alone


@pytest.mark.parametrize(("target", "delta", "q", "steps"), GRID)
def test_a_guess_is_near_the_account_on_a_coarse_grid_too(target, delta, q, steps):
    sigma = calibrate(target, delta, q, steps)
    truth = epsilon([Release(sigma, q, steps)], delta)
    assert guess(sigma, q, steps, delta, 1e-3) == pytest.approx(truth, rel=0.01)
    spread = module._deviation(target, delta) / steps**0.5  # of one release's loss
    assert guess(sigma, q, steps, delta, spread / 3) == pytest.approx(truth, rel=0.02)


def test_a_guess_beyond_all_numbers_is_infinite_and_a_harmless_release_costs_nothing():
    assert guess(0.01, 0.5, 10, 1e-5, 1e-3) == float("inf")  # one release's loss is too large
    assert guess(0.2, 1.0, 10**4, 1e-5, 1e-2) == float("inf")  # the sum's
    assert guess(50.0, 1e-6, 1, 1e-3, 1e-3) == 0.0


def test_a_record_that_is_hardly_drawn_needs_no_less_than_the_floor():
    assert calibrate(1.0, 1e-3, 1e-3, 1) == module.SMALLEST


def test_the_answer_is_remembered():
    assert calibrate(3.0, 1e-5, 0.05, 400) == calibrate(3.0, 1e-5, 0.05, 400) and calibrate.cache_info().hits > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate(0.0, 1e-5, 0.1, 10), "epsilon must be positive"),
        (lambda: calibrate(math.inf, 1e-5, 0.1, 10), "epsilon must be positive and finite, got inf"),
        (lambda: calibrate(math.nan, 1e-5, 0.1, 10), "epsilon must be positive and finite, got nan"),
        (lambda: calibrate(1.0, 1e-5, 0.1, 0), "at least one step"),
        (lambda: calibrate(1.0, 1e-5, 0.0, 10), "q must be in"),
        (lambda: calibrate(1.0, 1.5, 0.1, 10), r"delta must be in \(0, 1\)"),
        (lambda: calibrate(1.0, 1e-5, 0.1, 10, "prv"), "unknown accountant"),
        (lambda: calibrate(1.0, 1e-5, 0.1, 10, "gdp"), "needs q = 1"),
        (lambda: calibrate(1e-7, 1e-5, 1.0, 10**6, "rdp"), "no noise multiplier"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(FedloraError, match=message):
        call()
