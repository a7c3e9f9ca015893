"""Membership scores against a loop, and against what is known of two normal distributions."""

import numpy as np
import pytest
from scipy.stats import norm

from fedlora_mini.errors import FedloraError
from fedlora_mini.metrics.membership import confidence, lira, roc, tpr_at


def table(K=12, M=9, gap=1.0, seed=0):
    """Scores N(base of the image, 1), higher by `gap` for members; half of the models saw an image."""
    rng = np.random.default_rng(seed)
    member = np.stack([rng.permutation(K) < K // 2 for _ in range(M)], 1)
    return 3 * rng.standard_normal(M) + gap * member + rng.standard_normal((K, M)), member


def by_loop(score, member, k, j):
    """The ratio of one model and image, with every sum written out."""
    value = 0.0
    others = [i for i in range(len(score)) if i != k]
    for inside in (True, False):
        squares, degrees = 0.0, 0
        for image in range(score.shape[1]):
            group = np.array([score[i, image] for i in others if member[i, image] == inside])
            squares, degrees = squares + ((group - group.mean()) ** 2).sum(), degrees + len(group) - 1
        mean = np.mean([score[i, j] for i in others if member[i, j] == inside])
        value += (1 if inside else -1) * norm.logpdf(score[k, j], mean, np.sqrt(squares / degrees))
    return value


def test_the_likelihood_ratio_is_that_of_a_loop_over_the_other_models():
    score, member = table()
    found = lira(score, member)
    for k, j in ((0, 0), (3, 5), (11, 8)):
        assert found[k, j] == pytest.approx(by_loop(score, member, k, j))


def test_a_model_s_own_scores_do_not_enter_its_shadows():
    score, member = table()
    changed = score.copy()
    changed[2, 1:] += 5.0
    assert lira(changed, member)[2, 0] == pytest.approx(lira(score, member)[2, 0])


def test_it_forgives_images_for_being_hard():
    score, member = table(K=40, M=60, gap=2.0)
    plain, ratio = (tpr_at(each, member, 0.05) for each in (score, lira(score, member)))
    assert ratio > 0.5 > 0.2 > plain


def test_without_a_difference_nothing_is_found():
    score, member = table(K=40, M=60, gap=0.0)
    false, true = roc(lira(score, member), member)
    assert np.trapezoid(true, false) == pytest.approx(0.5, abs=0.04)


def test_the_curve_of_two_normals_is_the_known_one():
    rng = np.random.default_rng(1)
    score, member = (
        np.concatenate([rng.standard_normal(40_000) + 1, rng.standard_normal(40_000)]),
        np.arange(80_000) < 40_000,
    )
    false, true = roc(score, member)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.abs(true - norm.cdf(norm.ppf(false) + 1)).max() < 0.01
    assert tpr_at(score, member, 0.1) == pytest.approx(norm.cdf(norm.ppf(0.1) + 1), abs=0.01)


def test_equal_scores_are_one_threshold():
    false, true = roc([1, 1, 0, 0], [True, False, True, False])
    assert false.tolist() == [0, 0.5, 1] == true.tolist()


def test_confidence_is_the_logit_of_the_mean_probability():
    p = np.array([0.01, 0.5, 0.999])
    assert confidence(-np.log(p)) == pytest.approx(np.log(p / (1 - p)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lira(np.zeros((4, 2)), np.zeros((4, 3))), "two tables"),
        (lambda: lira(np.zeros((4, 2)), np.ones((4, 2))), "at least three models"),
        (lambda: roc([1.0, 2.0], [True, True]), "members and others"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(FedloraError, match=message):
        call()
