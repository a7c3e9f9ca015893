"""The curve of one release against the library's loop over it, and against integrals."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedlora_mini.privacy import Release
from fedlora_mini.privacy.loss import epsilon_of, hockey_stick

GRID = [
    (0.2, 8e-4, 70),
    (0.6, 0.01, 100),
    (1.0, 0.2, 50),
    (2.0, 0.05, 700),
    (0.9, 0.002, 500),
    (4.0, 0.5, 20),
    (0.8, 1, 3),
]


@pytest.mark.parametrize(("sigma", "q", "steps"), GRID)
def test_epsilon_is_the_librarys_own(sigma, q, steps):
    from dp_accounting.pld import privacy_loss_distribution as pld

    theirs = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=2e-3)
    expected = theirs.self_compose(steps).get_epsilon_for_delta(1e-5)
    assert epsilon_of([Release(sigma, q, steps)], 1e-5, 2e-3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.1), (1.3, 0.4), (2.0, 1.0)])
def test_the_curve_is_the_integral_of_what_exceeds_e_to_the_epsilon(sigma, q, removed):
    eps = np.array([-1.5, -0.3, 0.0, 0.2, 0.45, 1.7])
    found = hockey_stick(eps, sigma, q, removed)

    def excess(z, e):
        plain = norm.pdf(z, scale=sigma)
        mixed = (1 - q) * plain + q * norm.pdf(z, 1, sigma)
        p, other = (mixed, plain) if removed else (plain, mixed)
        return max(0.0, p - np.exp(e) * other)

    expected = [quad(excess, -9 * sigma, 1 + 9 * sigma, args=(e,), limit=400, epsabs=1e-10)[0] for e in eps]
    assert found == pytest.approx(expected, abs=2e-7)


def test_a_finer_grid_never_gives_a_larger_epsilon():
    """Dots that are connected with more of them in between lie lower."""
    told = [Release(0.9, 0.01, 300)]
    found = [epsilon_of(told, 1e-5, interval) for interval in (16e-3, 8e-3, 4e-3, 2e-3, 1e-3)]
    assert found == sorted(found, reverse=True)
