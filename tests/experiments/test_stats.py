import numpy as np
import pytest
from scipy.stats import bootstrap

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.compare import parse_seeds
from fedlora_mini.experiments.stats import holm, paired_difference


def test_the_interval_holds_a_known_difference_and_shrinks_with_seeds():
    rng = np.random.default_rng(0)
    widths = []
    for seeds in (4, 64):
        base = rng.normal(0.8, 0.05, (seeds, 4))
        d = paired_difference(base + 0.02 + rng.normal(0, 0.01, base.shape), base)
        assert d.low < 0.02 < d.high and d.low < d.mean < d.high
        widths.append(d.high - d.low)
    assert widths[1] < widths[0] / 2


def test_with_one_site_it_agrees_with_an_independent_bootstrap():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 0.1, (30, 1)), rng.normal(0.45, 0.1, (30, 1))
    ours = paired_difference(a, b)
    theirs = bootstrap(((a - b)[:, 0],), np.mean, method="percentile", n_resamples=20_000, rng=rng).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.005)
    assert ours.high == pytest.approx(theirs.high, abs=0.005)


def test_pairing_removes_what_both_arms_share():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 0.3, (8, 1))  # a seed may be hard for both
    a, b = 0.6 + hard + rng.normal(0, 0.01, (8, 4)), 0.58 + hard + rng.normal(0, 0.01, (8, 4))
    assert paired_difference(a, b).low > 0


def test_too_few_seeds_give_no_p_value():
    a = np.random.default_rng(3).random((5, 2))
    assert paired_difference(a + 1, a).p is None
    a = np.random.default_rng(3).random((8, 2))
    assert paired_difference(a + 1, a).p == pytest.approx(2 / 2**8)


def test_unpaired_tables_are_refused():
    with pytest.raises(FedloraError, match="paired arms"):
        paired_difference(np.zeros((3, 2)), np.zeros((2, 2)))


def test_holm_on_a_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(("text", "seeds"), [("0-2", [0, 1, 2]), ("3", [3]), ("0,2-3", [0, 2, 3])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "0-x", "1,1", "2-1"])
def test_other_seeds_are_refused(text):
    with pytest.raises(FedloraError, match="seeds"):
        parse_seeds(text)
