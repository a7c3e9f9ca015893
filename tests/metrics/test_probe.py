"""The linear probe against an explicit fit, its value under chance, and the swap of private factors."""

import numpy as np
import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.metrics.probe import flat, site_probe, site_probe_null, swap_drop

T, K, D = 20, 4, 30


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def marked(size, seed=0):
    """Noise in every round, a common drift of the round, and a mark of the site."""
    return draw(T, K, D, seed=seed) + 5 * draw(T, 1, D, seed=seed + 1) + size * draw(K, D, seed=seed + 2)


def explicit(updates, labels, folds, components, ridge):
    """The same probe in NumPy: PCA by the covariance's eigenvectors, ridge by normal equations with an intercept."""
    X, labels, hits = updates.double().numpy(), labels.numpy(), []
    X = X - X.mean(1, keepdims=True)
    for test in np.array_split(np.arange(T), folds):
        train = np.setdiff1d(np.arange(T), test)
        a, b = X[train].reshape(-1, D), X[test].reshape(-1, D)
        values, vectors = np.linalg.eigh(np.cov(a.T, bias=True) * len(a))
        axes = vectors[:, ::-1][:, :components]
        F = np.c_[(a - a.mean(0)) @ axes, np.ones(len(a))]
        penalty = np.diag([ridge * values[-1]] * axes.shape[1] + [0.0])
        W = np.linalg.solve(F.T @ F + penalty, F.T @ np.eye(K)[labels[train].ravel()])
        scores = np.c_[(b - a.mean(0)) @ axes, np.ones(len(b))] @ W
        hits += (scores.argmax(1) == labels[test].ravel()).tolist()
    return np.mean(hits)


@pytest.mark.parametrize(("size", "components", "ridge"), [(0.3, 10, 1e-2), (0.6, 5, 1e-1), (0.6, 30, 1e-3)])
def test_it_is_the_ridge_regression_of_the_indicators_on_the_principal_components(size, components, ridge):
    updates, sites = marked(size), torch.arange(K).expand(T, K)
    expected = explicit(updates, sites, 5, components, ridge)
    assert site_probe(updates, 5, components, ridge) == pytest.approx(expected) and 1 / K < expected < 1


def test_it_reads_a_mark_and_nothing_else():
    assert site_probe(marked(2.0)) > 0.95
    g = torch.Generator().manual_seed(0)
    assert site_probe(marked(2.0)) > float(site_probe_null(marked(2.0), g).max())
    unmarked = [site_probe(marked(0.0, seed=10 * s)) for s in range(60)]
    assert np.mean(unmarked) == pytest.approx(1 / K, abs=0.02)


@pytest.mark.parametrize("size", [0.0, 2.0])
def test_shuffled_names_are_found_one_time_in_k(size):
    """Also where the sites can be told apart: the rounds' names are drawn independently of each other."""
    g = torch.Generator().manual_seed(1)
    null = site_probe_null(marked(size), g, draws=2000)
    assert null.shape == (2000,) and 0 <= null.min() < null.max() <= 1
    assert float(null.mean()) == pytest.approx(1 / K, abs=3 * float(null.std()) / 2000**0.5)


def test_what_a_round_has_in_common_hides_nothing():
    moved = marked(1.0) + 1e3 * draw(T, 1, D, seed=9)
    assert site_probe(moved) == site_probe(marked(1.0)) > 0.8


def test_features_of_unrelated_images_are_not_centred_by_rows():
    """A row's images have nothing in common, so that their mean is noise; without a mark the probe guesses."""
    images = draw(4 * T, K, D) + 0.5 * draw(K, D, seed=1)
    found = {centre: site_probe(images, centre=centre) for centre in (True, False)}
    assert found[False] > 0.8 and site_probe_null(images, torch.Generator(), centre=False).mean() < 0.3
    unmarked = [site_probe(draw(T, K, D, seed=seed), centre=False) for seed in range(60)]
    assert np.mean(unmarked) == pytest.approx(1 / K, abs=0.02)
    assert site_probe(marked(1.0), centre=False) < site_probe(marked(1.0)), "a round's drift hides the mark"


def test_equal_updates_are_a_guess_and_a_single_fold_is_refused():
    assert site_probe(torch.zeros(T, K, D)) == pytest.approx(1 / K)
    with pytest.raises(FedloraError, match="between 2 and the number of rounds, 20, got 1"):
        site_probe(marked(1.0), folds=1)


def test_states_become_vectors_by_round_and_site():
    rounds = [[{"a": draw(2, 3, seed=10 * t + k), "b": draw(4, seed=t)} for k in range(3)] for t in range(2)]
    vectors = flat(rounds)
    assert vectors.shape == (2, 3, 10)
    assert torch.equal(vectors[1, 2], torch.cat([rounds[1][2]["a"].flatten(), rounds[1][2]["b"]]))


def test_swap_drop_is_own_minus_the_mean_of_the_others():
    table = draw(3, 3)
    privates = [{"A": torch.tensor(float(j))} for j in range(3)]
    seen = []

    def evaluate(state, k):
        seen.append((k, int(state["A"])))
        assert float(state["B"]) == 7.0
        return float(table[k, int(state["A"])])

    drop = swap_drop(evaluate, {"B": torch.tensor(7.0)}, privates)
    expected = [table[k, k] - (table[k].sum() - table[k, k]) / 2 for k in range(3)]
    assert torch.allclose(drop, torch.stack(expected)) and sorted(seen) == [(k, j) for k in range(3) for j in range(3)]
