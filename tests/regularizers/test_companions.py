"""The table of training-time companions, and what card 4.5 asks of ARENA as a row of both tables."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.adapters import ADAPTERS, adapters, call, load_state, merge, prepare, trainable
from fedlora_mini.adapters.base import Key, freeze
from fedlora_mini.adapters.diagonal import Diagonal, prune
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import Schedule
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.metrics.rank import ranks
from fedlora_mini.models import build
from fedlora_mini.regularizers import (
    L1,
    Context,
    Diversity,
    FlatNoise,
    Growth,
    InputMask,
    Orthogonality,
    RankBudget,
    Regularizer,
    Riemannian,
)
from fedlora_mini.regularizers.companions import COMPANIONS, companions
from fedlora_mini.state import finite, norm, sub

SMALL = {"minisam": dict(d=16, depth=1, stem=4, width=4), "unet": dict(features=(8, 8, 8))}
no_v = Schedule("no v", lambda key, round, step, steps: key.factor != "v")


def network(row, name="minisam", **options):
    return prepare(build(name, 2, **SMALL[name]), row, **options)


def mean_loss(model, state):
    """On discs that no step has seen."""
    g = torch.Generator().manual_seed(99)
    x, grid = torch.rand(8, 3, 16, 16, generator=g) * 0.3, torch.arange(16)
    centre = torch.randint(4, 12, (8, 2, 1, 1), generator=g)
    y = ((grid[:, None] - centre[:, 0]) ** 2 + (grid[None] - centre[:, 1]) ** 2 < 12).to(torch.uint8)
    with torch.no_grad():
        return segmentation_loss(call(model, state, x + 0.5 * y[:, None]), y).mean().item()


def gates(state):
    return torch.cat([value for name, value in state.items() if name.endswith(".v")])


# ---------------------------------------------------------------- the table


def test_every_companion_belongs_to_a_row_of_the_adapters():
    assert COMPANIONS.keys() <= ADAPTERS.keys()
    for row in ADAPTERS:
        terms = companions(row)
        assert bool(terms) == (row in COMPANIONS)
        assert all(isinstance(term, Regularizer) and term.label for term in terms)


def test_the_defaults_are_those_of_the_cards():
    assert companions("arena") == (L1(1e-3),)
    assert companions("sora") == (L1(3e-4, step="adam", threshold="plain", weight=10.0),)
    assert companions("adalora") == (Orthogonality(0.1), RankBudget(4))
    assert companions("aroma") == (Growth(inner_tol=1e-4, outer_tol=1e-4, window=3),)
    assert companions("prilora") == (InputMask(every=40, ratio=0.5),)
    assert companions("flat_lora") == (FlatNoise(0.05),)
    assert companions("riemannian") == (Riemannian(1e-6),)
    assert companions("pego") == (Diversity(2, 1e-3, 1e-3),)


def test_options_reach_the_terms():
    assert companions("arena", lam=0.1, gauge="unit", rho=1.0) == (L1(0.1, gauge="unit", rho=1.0),)
    assert companions("sora", lam=0.1, weight=0.0) == (L1(0.1, step="adam", threshold="plain"),)
    assert companions("adalora", final=2, gamma=0.5, every=3) == (Orthogonality(0.5), RankBudget(2, every=3))
    assert companions("aroma", longest=7) == (Growth(longest=7),)
    assert companions("prilora", beta=0.5) == (InputMask(beta=0.5),)
    assert companions("flat_lora", rho=0.1, seed=3) == (FlatNoise(0.1, seed=3),)
    assert companions("riemannian", eps=0.1) == (Riemannian(0.1),)
    assert companions("pego", blocks=4) == (Diversity(4),)


@pytest.mark.parametrize(
    ("row", "option", "message"),
    [
        ("arena", "lamb", r"option of adapter 'arena' 'lamb'; accepted: .*order, ramp.*Did you mean 'lam'"),
        ("adalora", "gama", r"accepted: .*gamma, start, .*Did you mean 'gamma'"),
        ("aroma", "grouped", r"'grouped'; accepted: check, inner_tol, longest"),
        ("prilora", "period", "accepted: beta, every, ratio"),
        ("sora", "gauge", "accepted: lam, threshold, weight"),
        ("lora", "lam", "option of adapter 'lora' 'lam'; accepted: none"),
    ],
)
def test_options_that_nothing_takes_are_refused(row, option, message):
    with pytest.raises(FedloraError, match=f"unknown training .*{message}"):
        companions(row, **{option: 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("row", COMPANIONS)
def test_every_row_learns_with_its_companions(row, name, fit):
    """With the defaults of both tables: a lower loss on unseen images, finite numbers, and the base as it was."""
    model = network(row, name)
    before, start = model.state_dict(), trainable(model)
    weights = {path: value.clone() for path, value in before.items() if ".base." in path}
    [end] = fit(model, *companions(row), steps=25)
    assert finite(end) and mean_loss(model, end) < 0.9 * mean_loss(model, start)
    assert all(torch.equal(value, model.state_dict()[path]) for path, value in weights.items())


# ---------------------------------------------------------------- card 4.5: ARENA beside LoRA


def test_without_lambda_and_with_v_held_still_it_is_lora_to_the_bit(fit):
    """In a UNet, with s = 7/4, decay and a cosine. MiniSAM's case stands in test_sparse."""
    budget = {"steps": 5, "weight_decay": 0.1, "pace": "cosine"}
    [lora] = fit(network("lora", "unet", rank=4, alpha=7.0), schedule=no_v, **budget)
    model = network("arena", "unet", rank=4, alpha=7.0)
    [arena] = fit(model, *companions("arena", lam=0.0), schedule=no_v, **budget)
    assert all(torch.equal(arena[name], value) for name, value in lora.items())
    assert set(arena) - set(lora) == {name for name in arena if name.endswith(".v")} and (gates(arena) == 1).all()
    assert not any(torch.equal(value, trainable(model)[name]) for name, value in lora.items())


def test_without_lambda_it_is_lora_with_a_trained_v(fit):
    """Against Diagonal without a term where all is SGD, and against SGD on v by hand beside Adam on the rest."""

    class OnV(Regularizer):
        def gradient_(self, gradient, state, context):
            context.memory["g"] = {name: gradient.pop(name) for name in list(gradient) if name.endswith(".v")}

        def prox_(self, state, context):
            for name, g in context.memory["g"].items():
                state[name] -= context.lr * g

    model = network("arena", rank=4, start="gate").double()
    for optimiser, other in (("sgd", ()), ("adam", (OnV(),))):
        [end] = fit(model, *companions("arena", lam=0.0), optimiser=optimiser, lr=0.05)
        [expected] = fit(model, *other, optimiser=optimiser, lr=0.05)
        assert norm(sub(end, expected)) < 1e-12 * norm(expected)
        assert not torch.equal(gates(end), gates(trainable(model)))


def test_a_large_lambda_leaves_rank_0_and_the_frozen_weights(fit):
    model = network("arena", rank=4)
    [end] = fit(model, *companions("arena", lam=200.0))
    assert (gates(end) == 0.0).all() and set(ranks(model, end).values()) == {0}
    load_state(model, end)
    plain = freeze(build("minisam", 2, **SMALL["minisam"]))
    layers = dict(adapters(merge(model)))
    for path, adapter in layers.items():
        same = torch.equal(adapter.base.weight, plain.get_submodule(path).weight)
        assert same == (path != "head")  # the head has learned, nothing else has
    assert len(layers) > 5


def test_the_rank_falls_with_lambda_and_what_is_gone_is_0(fit):
    """Summed over a network's layers, trained for a while; weakly monotone, and full at λ = 0."""
    model, totals = network("arena", rank=6, start="unit"), []
    for lam in (0.0, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.3):
        [end] = fit(model, *companions("arena", lam=lam, rho=0.1), steps=12)
        v = gates(end)
        totals.append(int((v != 0).sum()))
        assert sum(ranks(model, end).values()) == totals[-1]
        assert not ((v != 0) & (v.abs() < 1e-12)).any()
    assert totals == sorted(totals, reverse=True) and totals[0] == len(v) and totals[-1] == 0
    assert len(set(totals)) > 3


def test_pruning_what_training_left_gives_the_same_from_fewer_numbers(fit):
    model = network("arena", rank=6, start="unit")
    [end] = fit(model, *companions("arena", lam=0.02, rho=0.1), steps=12)
    load_state(model, end)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, kept = model(x), {path: r for path, r in ranks(model, end).items() if r}
    assert 0 < len(kept) < len(ranks(model, end))  # some layers are left with none at all
    pruned = prune(model)
    assert ranks(pruned, trainable(pruned)) == kept
    assert torch.allclose(pruned(x), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- card 4.5: a matrix of rank 3 under noise


def noisy(m=16, n=20):
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64))[0] for k in (m, n))
    signal = U[:, :3] * torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64) @ V[:, :3].T
    return signal + 0.05 * torch.randn(m, n, generator=g, dtype=torch.float64)


def descend(adapter, W, *terms, steps=1500, lr=0.02):
    """½ ||ΔW - W||² by gradient steps and the terms' hooks; the end's ΔW and rank."""
    state = {f"P.{name}": value.requires_grad_() for name, value in trainable(adapter).items()}
    key = {name: Key("P", name[2:], "encoder", "linear") for name in state}
    context = Context(1, 1, {}, key, lr, steps, layers={"P": adapter}, moves=frozenset(state))
    v = state.get("P.v", torch.ones(adapter.rank, dtype=torch.float64))
    for _ in range(steps):
        loss = 0.5 * ((state["P.B"] * v) @ state["P.A"] - W).square().sum()
        gradient = dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))
        with torch.no_grad():
            for term in terms:
                term.gradient_(gradient, state, context)
            for name, g in gradient.items():
                state[name] -= lr * g
            for term in terms:
                term.prox_(state, context)
    return ((state["P.B"] * v) @ state["P.A"]).detach(), int((v != 0).sum())


@pytest.mark.slow
def test_arena_ends_at_the_same_matrix_from_any_rank_and_lora_does_not():
    """In the unit gauge a singular value σ of W ends at v with σ - v = λ / (1 + 2 v²), or at 0 where σ <= λ.

    A and B lengthen a direction too: with g = b_iᵀ G a_i = v - σ a step takes v to (v - ρ g - ρ λ) (1 - ρ v g)², so at
    rest g (1 + 2 v²) = -λ. Large directions shrink less than by singular value thresholding, whose shrinkage is λ.
    LoRA fits as much noise as its rank allows.
    """
    W, lam = noisy(), 0.6
    U, sigma, Vh = np.linalg.svd(W.numpy())
    rest = [next(v.real for v in np.roots([2, -2 * s, 1, lam - s]) if abs(v.imag) < 1e-12) for s in sigma if s > lam]
    assert len(rest) == 3
    expected = torch.from_numpy(U[:, :3] * rest @ Vh[:3])
    best = torch.from_numpy(U[:, :3] * sigma[:3] @ Vh[:3])
    noise = []
    for r in (4, 8, 16):
        bases = [nn.Linear(20, 16, bias=False).double().requires_grad_(False) for _ in range(2)]
        arena = Diagonal(bases[0], r, start="unit", generator=torch.Generator().manual_seed(1))
        nn.init.ones_(arena.v)  # from 0 no direction starts whose gradient is below λ
        end, rank = descend(arena, W, *companions("arena", lam=lam, gauge="unit"))
        assert rank == 3 and (end - expected).norm() < 3e-3 * expected.norm(), r
        lora, _ = descend(LoRA(bases[1], r, generator=torch.Generator().manual_seed(1)), W)
        noise.append((lora - best).norm().item())
    assert noise == sorted(noise) and noise[2] > 2 * noise[0]
