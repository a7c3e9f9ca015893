"""A budget is asked before a release, and a checkpoint cannot forget it."""

import pytest

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy import BudgetSpent, Ledger, Release, epsilon


def test_it_adds_up():
    ledger = Ledger(method="rdp")
    for _ in range(3):
        ledger.spend(Release(1.0, 0.05, 10))
    ledger.spend(Release(2.0, 0.05, 5))
    assert ledger.releases == [Release(1.0, 0.05, 30), Release(2.0, 0.05, 5)]
    assert ledger.spent() == epsilon([Release(1.0, 0.05, 30), Release(2.0, 0.05, 5)], 1e-5, "rdp")


def test_it_stops_before_the_budget_is_exceeded():
    ledger = Ledger(1.5, method="rdp")
    made = 0
    with pytest.raises(BudgetSpent, match=r"of 1\.5 at delta 1e-05"):
        for _ in range(1000):
            ledger.spend(Release(1.0, 0.02, 10))
            made += 10
    assert ledger.spent() <= 1.5 < ledger.spent([Release(1.0, 0.02, 10)])
    assert ledger.releases == [Release(1.0, 0.02, made)] and made > 0, "what was refused is not written down"


def test_a_saved_ledger_goes_on_where_it_was():
    ledger = Ledger(2.0, 1e-6, "rdp")
    ledger.spend(Release(1.0, 0.02, 40))
    again = Ledger.fromdict(ledger.asdict())
    assert again == ledger and again.spent() == ledger.spent() > 0


def test_a_file_without_releases_is_no_ledger():
    with pytest.raises(FedloraError, match="lacks releases"):
        Ledger.fromdict({"budget": 1.0, "delta": 1e-5, "method": "rdp"})


@pytest.mark.parametrize(("given", "message"), [((0.0,), "budget"), ((1.0, 2.0), "delta"), ((1.0, 1e-5, "x"), "acc")])
def test_bad_budgets_are_named(given, message):
    with pytest.raises(FedloraError, match=message):
        Ledger(*given)
