"""Counted directions and singular values of thin pairs, against numpy on the dense ΔW."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.adapters import LoRA, adapters, inject, prepare, trainable
from fedlora_mini.adapters.base import delta_of, freeze
from fedlora_mini.adapters.diagonal import Diagonal, prune
from fedlora_mini.adapters.ops import to_matrix
from fedlora_mini.metrics.rank import direction_norms, effective_rank, pairs, ranks, singular_values
from fedlora_mini.models import build
from fedlora_mini.state import clone


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(name, **options):
    """A network with the row's adapters, and a state with every factor a random number."""
    model = prepare(build("minisam", 2, d=16, depth=1, stem=8, width=8), name, **options)
    return model, {n: draw(*v.shape, seed=k) for k, (n, v) in enumerate(trainable(model).items())}


def dense(model, state):
    """path -> ΔW as a matrix, formed; of adapters, not of the head."""
    return {
        path: to_matrix(a.base, delta_of(a, {f: state[f"{path}.{f}"] for f in a.factors}))
        for path, a in adapters(model)
        if path != "head"
    }


@pytest.mark.parametrize(("m", "n", "r"), [(20, 30, 4), (30, 20, 4), (5, 30, 8), (30, 5, 8), (6, 6, 6), (4, 5, 1)])
def test_singular_values_are_those_of_the_product(m, n, r):
    P, Q = draw(m, r), draw(r, n, seed=1)
    expected = np.linalg.svd((P.double() @ Q.double()).numpy(), compute_uv=False)
    found = singular_values(P, Q).numpy()
    assert found.dtype == np.float64 and len(found) == min(m, n, r)
    assert np.allclose(found, expected[: len(found)], rtol=1e-10, atol=0)
    assert np.allclose(expected[len(found) :], 0, atol=1e-10)


def test_singular_values_of_degenerate_pairs():
    P, Q = draw(8, 3), draw(3, 9, seed=1)
    P[:, 2] = P[:, 1]
    Q[2] = -Q[1]  # two directions that cancel
    found = singular_values(P, Q)
    assert found[0] == pytest.approx(float(P[:, 0].double().norm() * Q[0].double().norm()), rel=1e-6)
    assert found[1:].max() < 1e-6 * found[0]
    assert not singular_values(torch.zeros(8, 3), Q).any()


@pytest.mark.parametrize(("name", "options"), [("lora", {"alpha": 7.0}), ("arena", {"alpha": 7.0}), ("prilora", {})])
def test_pairs_multiply_to_delta_on_every_layer(name, options):
    model, state = randomised(name, **options)
    found, expected = pairs(model, state), dense(model, state)
    assert found.keys() == expected.keys()
    for path, (P, Q) in found.items():
        assert torch.allclose(P @ Q, expected[path], rtol=1e-4, atol=1e-5), path
        sigma = np.linalg.svd(expected[path].double().numpy(), compute_uv=False)[: P.shape[1]]
        assert np.allclose(singular_values(P, Q).numpy(), sigma, atol=1e-5 * sigma[0])


def test_pairs_read_the_state_and_not_the_model():
    model, state = randomised("lora")
    before = clone(trainable(model))
    assert all((P == 0).all() for P, _ in pairs(model, before).values())  # B = 0 at the start
    assert all((P != 0).any() for P, _ in pairs(model, state).values())
    some = {name: value for name, value in state.items() if name.endswith(".B")}
    for path, (P, Q) in pairs(model, some).items():  # what the state lacks is the model's own
        assert torch.equal(P, state[f"{path}.B"]) and torch.equal(Q, before[f"{path}.A"])


@pytest.mark.parametrize("name", ["dora", "edora", "houlsby", "ia3", "alore", "bitfit", "full"])
def test_what_is_no_product_of_a_pair_is_left_out(name):
    """DoRA's thin pair is not its update, which has full rank: the rows of W_0 are scaled too."""
    model, state = randomised(name)
    assert pairs(model, state) == {} == ranks(model, state)
    if name == "dora":
        assert all(torch.linalg.matrix_rank(D.double()) == min(D.shape) for D in dense(model, state).values())


def test_ranks_count_what_is_not_exactly_zero():
    """||v||_0 for B diag(v) A, however small; a zero row of A or column of B counts nothing either."""
    model, state = randomised("arena", rank=6)
    expected = {}
    for k, path in enumerate(pairs(model, state)):
        state[f"{path}.v"][: k % 7] = 0.0
        expected[path] = 6 - k % 7
        D = dense(model, state)[path]
        assert torch.linalg.matrix_rank(D, rtol=1e-5) == min(expected[path], *D.shape)
        state[f"{path}.v"][5:] *= 1e-30
    assert ranks(model, state) == expected and set(expected.values()) == set(range(7))
    lora, state = randomised("lora", rank=4)
    first = next(iter(pairs(lora, state)))
    state[f"{first}.A"][0], state[f"{first}.B"][:, 2] = 0.0, 0.0
    assert ranks(lora, state)[first] == 2 and set(ranks(lora, state).values()) == {2, 4}
    assert set(ranks(lora, trainable(lora)).values()) == {0}


def test_direction_norms_are_the_norms_of_the_rank_one_terms():
    P, Q = draw(8, 3), draw(3, 9, seed=1)
    expected = [torch.linalg.matrix_norm(torch.outer(P[:, i], Q[i]).double()).item() for i in range(3)]
    assert direction_norms(P, Q).tolist() == pytest.approx(expected, rel=1e-6)


def test_counted_ranks_are_what_pruning_keeps():
    model = freeze(build("minisam", 2, d=16, depth=1, stem=8, width=8))
    inject(model, lambda layer, g: Diagonal(layer, 4, start="gate", generator=g))
    for k, (_, a) in enumerate(adapters(model)):
        nn.init.normal_(a.B)
        a.v.data[: k % 5] = 0
    before = ranks(model, trainable(model))
    after = ranks(prune(model), trainable(model))
    assert after == {path: r for path, r in before.items() if r} and 0 in before.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_effective_rank_is_the_exponential_of_the_entropy(dtype):
    for sigma in ([3.0, 2.0, 1.0, 0.5], [1.0, 1e-3], [5.0]):
        total = sum(sigma)
        expected = math.exp(-sum(s / total * math.log(s / total) for s in sigma))
        assert effective_rank(torch.tensor(sigma, dtype=dtype)) == pytest.approx(expected, rel=1e-6)
        padded = torch.tensor([*sigma, 0.0, 0.0], dtype=dtype)  # zeros add nothing
        assert effective_rank(padded) == pytest.approx(expected, rel=1e-6)
        assert effective_rank(1e-20 * padded) == pytest.approx(expected, rel=1e-5)  # nor does the scale
    assert effective_rank(torch.ones(7, dtype=dtype)) == pytest.approx(7)
    assert effective_rank(torch.tensor([4.0, 0.0, 0.0], dtype=dtype)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, dtype=dtype)) == 0
    assert effective_rank(torch.tensor([], dtype=dtype)) == 0


def test_the_effective_rank_lies_between_one_and_the_count():
    for seed in range(20):
        sigma = singular_values(draw(9, 5, seed=seed), draw(5, 12, seed=100 + seed))
        assert 1 < effective_rank(sigma) < 5


def test_lora_of_a_larger_rank_has_the_same_values_when_the_rest_is_zero():
    P, Q = draw(8, 3), draw(3, 9, seed=1)
    wide = singular_values(torch.cat([P, torch.zeros(8, 4)], 1), torch.cat([Q, draw(4, 9, seed=2)]))
    assert torch.allclose(wide[:3], singular_values(P, Q)) and wide[3:].max() < 1e-12 * wide[0]
    layer = LoRA(nn.Linear(9, 8), 3)
    assert singular_values(*layer.pair()).max() == 0
