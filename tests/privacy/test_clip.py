"""sum_i g_i min(1, C / ||g_i||) against the plain loop (on networks: tests/adapters/test_grouped.py)."""

import math

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy import CLIPS, clip_sum, norms


def gradients(n=7):
    g = torch.Generator().manual_seed(0)
    size = torch.logspace(-2, 2, n)
    shapes = {"a.A": (2, 3), "a.B": (4, 2), "head.d": (5,)}
    return {
        name: torch.randn(n, *shape, generator=g) * size.view(-1, *(1,) * len(shape)) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("C", [0.01, 1.0, 50.0, 1e6, float("inf")])
def test_it_equals_the_loop(C):
    g = gradients()
    total = {name: torch.zeros(value.shape[1:], dtype=torch.float64) for name, value in g.items()}
    for row in S.unstack(g):
        total = S.add(total, row, min(1.0, C / S.norm(row)))
    found = clip_sum(g, C)
    assert S.norm(S.sub(found, total)) < 1e-6 * S.norm(total)


def test_the_norm_is_flat_over_all_tensors():
    g = gradients()
    assert torch.allclose(norms(g), torch.tensor([S.norm(row) for row in S.unstack(g)]))


def test_no_sample_moves_the_sum_by_more_than_C():
    g, C = gradients(), 0.3
    whole = clip_sum(g, C)
    for i in range(7):
        others = {name: torch.cat([value[:i], value[i + 1 :]]) for name, value in g.items()}
        assert S.norm(S.sub(whole, clip_sum(others, C))) <= C * (1 + 1e-5)


def test_a_zero_gradient_stays_zero():
    assert S.finite(clip_sum({"a.A": torch.zeros(3, 2)}, 1.0))


def test_an_empty_batch_sums_to_zero():
    """Poisson sampling draws it now and then."""
    assert torch.equal(clip_sum({"a.A": torch.zeros(0, 2, 3)}, 1.0)["a.A"], torch.zeros(2, 3))


@pytest.mark.parametrize("C", [0.0, -1.0, float("nan")])
def test_the_norm_must_be_positive(C):
    with pytest.raises(FedloraError, match="must be positive"):
        clip_sum(gradients(), C)


@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])  # the square of the last one is not finite
@pytest.mark.parametrize("name", ["a.A", "head.d"])
def test_a_gradient_whose_norm_is_not_finite_counts_as_nothing(how, value, name):
    """In the layer where it is broken and in the others: no record decides whether there is a sum."""
    g = gradients()
    others = {n: rows[[k for k in range(7) if k != 2]] for n, rows in g.items()}
    g[name][2].view(-1)[1] = value
    found, expected = clip_sum(g, 0.7, how), clip_sum(others, 0.7, how)
    assert S.finite(found) and S.norm(S.sub(found, expected)) < 1e-6 * S.norm(expected)
    alone = clip_sum({n: rows[2:3] for n, rows in g.items()}, 0.7, how)
    assert all(torch.equal(total, torch.zeros_like(total)) for total in alone.values())


def test_nor_does_it_without_clipping():
    g = {"a.A": torch.tensor([[1.0, 2.0], [math.inf, 0.0], [3.0, 4.0]])}
    assert torch.equal(clip_sum(g, math.inf)["a.A"], torch.tensor([4.0, 6.0]))


@pytest.mark.parametrize("how", CLIPS)
def test_sums_of_several_batches_in_one_call_are_those_of_each(how):
    """Inside `torch.func.vmap`, as the audits use it."""
    g = torch.stack([gradients()["a.A"], 3 * gradients()["a.A"]])  # (2, N, …)
    g[1, 4, 0, 0] = math.nan
    found = torch.func.vmap(lambda own: clip_sum({"a.A": own}, 0.5, how))(g)["a.A"]
    for total, own in zip(found, g, strict=True):
        assert torch.allclose(total, clip_sum({"a.A": own}, 0.5, how)["a.A"])


@pytest.mark.parametrize("how", CLIPS)
def test_inside_autocast_no_row_becomes_longer_than_C(how):
    g = {name: value[:1] * 100 for name, value in gradients().items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = clip_sum(g, 1.0, how)
    assert S.norm(found) <= 1 + 1e-6 and {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], value) for name, value in clip_sum(g, 1.0, how).items())
