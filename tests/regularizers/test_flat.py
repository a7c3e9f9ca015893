"""Flat-LoRA's noise: its size row by row, when it grows, that it is seen by the forward pass and leaves W_0 alone."""

import copy
import math

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import adapters, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context
from fedlora_mini.regularizers.flat import FlatNoise


def wrapped(layer, seed=0, wrap=LoRA, **options):
    """An adapter at "P" away from its start, and its state."""
    g = torch.Generator().manual_seed(seed)
    adapter = wrap(layer.requires_grad_(False), generator=g, **options)
    return adapter, {f"P.{f}": torch.randn(getattr(adapter, f).shape, generator=g) for f in adapter.factors}


def context(adapter, round=1, step=2, steps=4):
    return Context(round, step, {}, {}, 0.1, steps, layers={"P": adapter})


def noise(term, adapter, state, **when):
    [(name, seen)] = term.view(state, context(adapter, **when)).items()
    assert name == "P.base.weight"
    return seen - adapter.base.weight


@pytest.mark.parametrize("wrap", [LoRA, Diagonal])
def test_every_row_has_the_standard_deviation_of_the_formula(wrap):
    n, rho, t, T = 20_000, 0.05, 3, 4
    layer = nn.Linear(n, 4, bias=False)
    with torch.no_grad():
        layer.weight *= torch.tensor([[0.0], [1.0], [30.0], [500.0]])  # the thin path alone, or little of it
    adapter, state = wrapped(layer, wrap=wrap, rank=2, alpha=6.0)
    eps = noise(FlatNoise(rho), adapter, state, step=t, steps=T)
    v = state.get("P.v", torch.ones(2))
    z = torch.empty(4, n)
    for i in range(4):
        row = [layer.weight[i] + 3.0 * sum(state["P.B"][i, k] * v[k] * state["P.A"][k] for k in range(2))]
        f = 0.5 * (1 - math.cos(math.pi * t / T))
        z[i] = eps[i] / (rho * f * row[0].norm() / math.sqrt(n))
    assert z.mean(1).abs().max() < 4 / math.sqrt(n)
    assert (z.square().mean(1) - 1).abs().max() < 4 * math.sqrt(2 / n)  # the variance of z² is 2
    assert (z.pow(4).mean(1) - 3).abs().max() < 4 * math.sqrt(96 / n)  # … and of z⁴ it is 96: a Gaussian
    assert (z @ z.T / n - torch.eye(4)).abs().max() < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    "layer, row",
    [
        (nn.Conv2d(4, 6, 3, groups=2), lambda W, i: W[i]),
        (nn.ConvTranspose2d(5, 6, 2), lambda W, i: W[:, i]),
        (nn.ConvTranspose3d(4, 6, 2, groups=2), lambda W, i: W[2 * (i // 3) : 2 * (i // 3) + 2, i % 3]),
    ],
    ids=["conv", "transposed", "transposed in groups"],
)
def test_a_row_is_an_output_of_the_layer(layer, row):
    """An output whose weights are all zero gets no noise, whatever the layout of the weight."""
    i = 4
    with torch.no_grad():
        row(layer.weight, i).zero_()
    adapter, state = wrapped(layer, rank=2)
    state["P.B"][i] = 0
    eps = noise(FlatNoise(), adapter, state)
    assert row(eps, i).abs().max() == 0
    assert all(row(eps, j).abs().min() > 0 for j in range(6) if j != i)


def test_it_grows_from_nothing_to_rho_over_the_round_or_over_all_rounds():
    adapter, state = wrapped(nn.Linear(3000, 2), rank=1)
    lengths = (adapter.base.weight + state["P.B"] @ state["P.A"]).norm(dim=1)

    def share(term, **when):
        return float((noise(term, adapter, state, **when).norm(dim=1) / lengths).mean() / term.rho)

    within = [share(FlatNoise(), step=t, steps=4) for t in (1, 2, 3, 4)]
    assert within == pytest.approx([(1 - math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4)], rel=0.1)
    through = [share(FlatNoise(total=8), round=round, step=2, steps=4) for round in (1, 2, 9)]
    assert through == pytest.approx([(1 - math.cos(math.pi * t / 8)) / 2 for t in (2, 6, 8)], rel=0.1)


def test_it_is_drawn_again_from_words_and_another_one_for_every_step():
    adapter, state = wrapped(nn.Linear(5, 4), rank=1)
    first = noise(FlatNoise(), adapter, state)
    assert torch.equal(first, noise(FlatNoise(), adapter, state))
    assert not torch.equal(first, noise(FlatNoise(seed=1), adapter, state))
    assert not torch.equal(first, noise(FlatNoise(), adapter, state, round=2))
    ratio = noise(FlatNoise(), adapter, state, step=3) / first
    assert ratio.std() > 0.1  # not the same numbers, only larger


def test_layers_of_one_shape_have_different_noise():
    adapter, state = wrapped(nn.Linear(5, 4), rank=1)
    twin = {"P": adapter, "Q": adapter}
    both = state | {name.replace("P", "Q"): value for name, value in state.items()}
    seen = FlatNoise().view(both, Context(1, 2, {}, {}, 0.1, 4, layers=twin))
    assert not torch.equal(seen["P.base.weight"], seen["Q.base.weight"])


def test_a_step_takes_the_gradient_at_the_noisy_weights(adapted, fit):
    model = adapted(LoRA, torch.float64, noise=0.1, rank=2)
    start, term = trainable(model), FlatNoise(0.5)
    [end] = fit(model, term, steps=1, optimiser="sgd")
    seen = term.view(start, Context(1, 1, {}, {}, 0.1, 1, layers=dict(adapters(model))))
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(seen, strict=False)
    [expected] = fit(by_hand, steps=1, optimiser="sgd")
    [without] = fit(model, steps=1, optimiser="sgd")
    assert S.norm(S.sub(end, expected)) < 1e-12 * S.norm(S.sub(end, start))
    assert S.norm(S.sub(end, without)) > 1e-2 * S.norm(S.sub(end, start))


def test_the_frozen_weights_keep_their_bits_and_training_its_determinism(adapted, fit):
    model = adapted(LoRA, rank=2)
    before = S.clone(model.state_dict())
    ends = [fit(model, FlatNoise(0.5, seed=seed))[0] for seed in (0, 0, 1)]
    assert S.digest(model.state_dict()) == S.digest(before)
    assert S.digest(ends[0]) == S.digest(ends[1]) != S.digest(ends[2])


def test_no_noise_is_plain_training(adapted, fit):
    model = adapted(Diagonal, rank=2)
    assert S.digest(fit(model, FlatNoise(0.0))) == S.digest(fit(model))


def test_errors(adapted, fit):
    with pytest.raises(FedloraError, match="rho must not be negative"):
        FlatNoise(-1.0)
    with pytest.raises(FedloraError, match="one after the other"):
        fit(adapted(LoRA, rank=2), FlatNoise(), clients=2, grouped=True)
