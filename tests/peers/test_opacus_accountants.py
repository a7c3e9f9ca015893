"""Epsilon against Opacus' accountants: Renyi's against Renyi's, the tight one against theirs."""

import pytest

pytestmark = pytest.mark.peers
accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed here: run `make peers`")

from fedlora_mini.privacy import Release, epsilon  # noqa: E402

GRID = [(0.6, 0.01, 100), (1.0, 0.01, 1000), (1.0, 0.2, 50), (2.0, 0.05, 700), (4.0, 0.5, 20)]


MIXED = [(1.0, 0.1, 60), (2.0, 0.3, 25), (0.8, 0.02, 200)]  # sampled mechanisms one after another


def theirs(kind, *history, delta=1e-5, **options):
    accountant = kind()
    accountant.history = list(history)
    return accountant.get_epsilon(delta, **options)


@pytest.mark.parametrize(("sigma", "q", "steps"), GRID)
def test_renyi_agrees_within_one_percent(sigma, q, steps):
    other = theirs(accountants.RDPAccountant, (sigma, q, steps))
    assert epsilon([Release(sigma, q, steps)], 1e-5, "rdp") == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize(("sigma", "q", "steps"), GRID)
def test_the_tight_one_agrees_within_one_percent(sigma, q, steps):
    other = theirs(accountants.PRVAccountant, (sigma, q, steps), eps_error=0.002)
    assert epsilon([Release(sigma, q, steps)], 1e-5) == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize("delta", [1e-5, 1e-6])
def test_several_mechanisms_together_agree_within_one_percent(delta):
    mine = [Release(*each) for each in MIXED]
    assert epsilon(mine, delta, "rdp") == pytest.approx(
        theirs(accountants.RDPAccountant, *MIXED, delta=delta), rel=0.01
    )
    tight = theirs(accountants.PRVAccountant, *MIXED, delta=delta, eps_error=0.002)
    assert epsilon(mine, delta) == pytest.approx(tight, rel=0.01)
