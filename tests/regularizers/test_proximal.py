"""Every closed form against a numerical minimiser of ½ ||z - x||² + τ f(z), which knows nothing of it."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.proximal import (
    group_soft_threshold,
    l1_minus_l2,
    on_singular_values,
    shrink,
    soft_threshold,
    weighted_soft_threshold,
)
from fedlora_mini.thin import product_svd

TAUS = (0.0, 0.05, 0.4, 1.3, 5.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lowest(objective, starts):
    """The smallest value that a derivative-free search finds from several starts, each restarted at its own end."""
    values = []
    for start in starts:
        for _ in range(3):
            found = minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
            start = found.x
        values.append(found.fun)
    return min(values)


def is_minimiser(z, x, f, metric=1.0, seed=0):
    """Whether no search finds a lower value than z's, while one of them does find z's."""

    def objective(point):
        return 0.5 * float((metric * (point - x) ** 2).sum()) + f(point)

    rng = np.random.default_rng(seed)
    starts = [x, np.zeros_like(x), *(rng.normal(size=(4, len(x))) + x), *np.diag(x)]
    return abs(lowest(objective, starts) - objective(z)) < 1e-8


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("seed", (0, 1))
def test_soft_thresholding_minimises_the_l1_problem(tau, seed):
    x = draw(3, seed=seed)
    assert is_minimiser(soft_threshold(x, tau).numpy(), x.numpy(), lambda z: tau * np.abs(z).sum())


@pytest.mark.parametrize("tau", TAUS)
def test_weighted_soft_thresholding_minimises_it_in_a_diagonal_metric(tau):
    x, d = draw(3), draw(3, seed=1).abs() + 0.1
    z = weighted_soft_threshold(x, tau, d).numpy()
    assert is_minimiser(z, x.numpy(), lambda z: tau * np.abs(z).sum(), d.numpy())
    if 0 < tau < 1:  # and the unweighted one does not
        assert not is_minimiser(soft_threshold(x, tau).numpy(), x.numpy(), lambda z: tau * np.abs(z).sum(), d.numpy())


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("seed", (0, 1))
def test_block_soft_thresholding_minimises_the_group_problem(tau, seed):
    x = draw(3, seed=seed)
    z = group_soft_threshold(x[None], tau, dim=1)[0].numpy()
    assert is_minimiser(z, x.numpy(), lambda z: tau * np.linalg.norm(z))


@pytest.mark.parametrize("tau", TAUS)
def test_shrinking_minimises_the_quadratic_problem(tau):
    x = draw(3)
    assert is_minimiser(shrink(x, tau).numpy(), x.numpy(), lambda z: tau * 0.5 * (z**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("ridge", (0.0, 0.7))
@pytest.mark.parametrize("alpha", (1.0, 0.6, 0.0, -0.5))
@pytest.mark.parametrize("tau", (0.05, 0.6, 0.8, 2.5))
def test_the_difference_of_l1_and_l2_has_its_closed_form(tau, alpha, ridge):
    """The largest |x_i| is 1.2, so the grid meets survivors, one survivor by the second case, and none."""
    x = torch.tensor([0.3, -1.2, 0.9], dtype=torch.float64)

    def f(z):
        return tau * (np.abs(z).sum() - alpha * np.linalg.norm(z) + 0.5 * ridge * (z**2).sum())

    assert is_minimiser(l1_minus_l2(x, tau, alpha, ridge).numpy(), x.numpy(), f)


def test_the_three_cases_of_the_difference_leave_some_one_and_no_entries():
    x = torch.tensor([0.3, -1.2, 0.9], dtype=torch.float64)
    counts = [int((l1_minus_l2(x, tau, 0.6) != 0).sum()) for tau in (0.05, 0.6, 2.5, 4.0)]
    assert counts == [3, 2, 1, 0]
    assert torch.equal(l1_minus_l2(x, 100.0, 1.0), torch.tensor([0.0, -1.2, 0.0], dtype=torch.float64))  # uncut
    with pytest.raises(FedloraError, match="at most 1"):
        l1_minus_l2(x, 0.1, 1.5)


def test_what_is_cut_is_plus_zero_to_the_bit():
    x = torch.tensor([0.3, -0.3, -0.1, 0.0, -0.0, 2.0, -2.0])
    pieces = (
        soft_threshold(x, 0.3)[:5],
        weighted_soft_threshold(x, 0.3, torch.ones(7))[:5],
        group_soft_threshold(x[None, :5], 1.0, dim=1),
        l1_minus_l2(x, 5.0, 0.1),
    )
    for cut in pieces:
        assert not cut.any() and not cut.signbit().any()
    assert torch.equal(soft_threshold(x, 0.3)[5:], torch.tensor([1.7, -1.7]))


def test_a_nan_is_not_cut_away():
    x = torch.tensor([[float("nan"), 0.1], [0.1, 0.1]])
    assert soft_threshold(x, 1.0).isnan().tolist() == [[True, False], [False, False]]
    assert group_soft_threshold(x, 1.0, dim=1).isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(("m", "n", "r"), [(6, 9, 3), (9, 6, 3), (4, 7, 6), (7, 4, 6), (3, 3, 1)])
def test_the_svd_of_a_product_is_that_of_the_matrix(m, n, r):
    B, A = draw(m, r), draw(r, n, seed=1)
    U, sigma, Vh = product_svd(B, A)
    k = min(m, n, r)
    I = torch.eye(k, dtype=torch.float64)
    assert torch.allclose(sigma, torch.linalg.svdvals(B @ A)[:k])
    assert torch.allclose(U * sigma @ Vh, B @ A)
    assert torch.allclose(U.mT @ U, I) and torch.allclose(Vh @ Vh.mT, I)


def lowest_matrix(Y, tau, alpha, ridge):
    """min_Z ½ ||Z - Y||² + τ (||Z||_* - α ||Z||_F + ½ ridge ||Z||²) over ALL Z, by ||PQ||_* = min ½ (||P||² + ||Q||²).

    The inner dimension is full, so the problem is smooth and the rank free. Quasi-Newton from several starts.
    """
    m, n = Y.shape
    k, values = min(m, n), []

    def objective(flat):
        theta = torch.tensor(flat, requires_grad=True)
        P, Q = theta[: m * k].view(m, k), theta[m * k :].view(k, n)
        Z = P @ Q
        f = 0.5 * theta.square().sum() - alpha * Z.norm() + 0.5 * ridge * Z.square().sum()
        value = 0.5 * (Z - Y).square().sum() + tau * f
        value.backward()
        return value.item(), theta.grad.numpy()

    for seed in range(6):
        start = draw((m + n) * k, seed=seed).numpy()
        values.append(minimize(objective, start, jac=True, options={"maxiter": 2000, "gtol": 1e-9}).fun)
    return min(values)


@pytest.mark.slow
@pytest.mark.parametrize("tau", (0.05, 0.4, 1.0))
@pytest.mark.parametrize(("alpha", "ridge"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.8)])
def test_the_prox_on_singular_values_minimises_over_full_matrices(tau, alpha, ridge):
    B, A = draw(4, 2), 0.5 * draw(2, 3, seed=1)
    U, sigma, Vh = on_singular_values(B, A, lambda values: l1_minus_l2(values, tau, alpha, ridge))
    Z, Y = U * sigma @ Vh, B @ A
    norms = torch.linalg.svdvals(Z).sum() - alpha * Z.norm() + 0.5 * ridge * Z.square().sum()
    value = 0.5 * (Z - Y).square().sum() + tau * norms
    assert lowest_matrix(Y, tau, alpha, ridge) == pytest.approx(value.item(), abs=1e-7)


def test_the_nuclear_prox_satisfies_its_optimality_condition():
    """(Y - Z) / τ is a subgradient of ||Z||_*: U Vᵀ plus a matrix orthogonal to it of spectral norm at most 1."""
    B, A, tau = draw(6, 4), draw(4, 5, seed=1), 2.0
    U, sigma, Vh = on_singular_values(B, A, lambda values: soft_threshold(values, tau))
    assert 0 < len(sigma) < 4
    rest = (B @ A - U * sigma @ Vh) / tau - U @ Vh
    assert torch.allclose(U.mT @ rest, torch.zeros_like(U.mT @ rest), atol=1e-12)
    assert torch.allclose(rest @ Vh.mT, torch.zeros_like(rest @ Vh.mT), atol=1e-12)
    assert torch.linalg.matrix_norm(rest, 2) <= 1
