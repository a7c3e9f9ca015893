"""The common part learns from the whole: the divergence by numpy, and who gets a gradient."""

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sharing import common
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build
from fedlora_mini.regularizers import Context
from fedlora_mini.regularizers.distill import Distill


def setting(adapter):
    model = prepare(build("minisam", 3, d=16, depth=1, stem=4, width=4), adapter, rank=2).double()
    rng = torch.Generator().manual_seed(0)
    state = {n: v + 0.3 * torch.randn(v.shape, generator=rng).double() for n, v in trainable(model).items()}
    x = torch.rand(2, 3, 16, 16, generator=rng).double()
    return model, state, x, (x[:, 0] * 3).to(torch.uint8)


def context(model, state, x):
    table = keys(model, list(state))
    return Context(1, 1, state, table, 0.1, x=x, run=lambda state, x: (call(model, state, x), None))


def silent(state):
    return {name: torch.zeros_like(v) if name.endswith(".B_own") else v for name, v in state.items()}


def softmax(f, tau):
    e = np.exp(f / tau - (f / tau).max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("adapter", ["pfedsam", "dual"])
@pytest.mark.parametrize(("lam", "tau"), [(0.5, 2.0), (1.0, 1.0)])
def test_the_value_is_the_divergence_of_the_two_predictions(adapter, lam, tau):
    model, state, x, _ = setting(adapter)
    found = float(Distill(lam, tau).penalty(state, context(model, state, x)))
    p, q = (softmax(call(model, s, x).numpy(), tau) for s in (state, silent(state)))
    assert found == pytest.approx(lam * tau**2 * (p * np.log(p / q)).sum(1).mean(), rel=1e-9)
    assert found > 1e-3


def test_where_the_private_branch_says_nothing_there_is_nothing_to_learn():
    model, state, x, _ = setting("pfedsam")
    state = silent(state)
    assert float(Distill().penalty(state, context(model, state, x))) == pytest.approx(0.0, abs=1e-12)


def test_only_the_common_part_gets_a_gradient():
    model, state, x, _ = setting("pfedsam")
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    value = Distill().penalty(leaves, context(model, leaves, x))
    found = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))
    moved = {name for name, g in found.items() if g is not None and g.any()}
    shared = {name for name, key in keys(model, list(state)).items() if common()(key)}
    assert moved == shared


def test_its_gradient_takes_the_common_prediction_to_the_whole_one():
    model, state, x, _ = setting("pfedsam")
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    value = Distill().penalty(leaves, context(model, leaves, x))
    g = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    stepped = {n: v if d is None else v - 0.05 * d for (n, v), d in zip(state.items(), g, strict=True)}
    p, before, after = (call(model, s, x).softmax(1) for s in (state, silent(state), silent(stepped)))
    assert (p * (p / after).log()).sum() < (p * (p / before).log()).sum()


def test_a_training_step_by_hand():
    model, start, x, y = setting("dual")
    method = Method("", "dual", common(), objective=(Distill(0.5, 2.0),))
    args = (keys(model, list(start)), [start], lambda step: (x, y), Budget(1, 2, 0.1, "sgd"), 1)
    [end], _ = train(model, method, *args)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    logits = call(model, leaves, x)
    p = (logits.detach() / 2).softmax(1)
    student = (call(model, silent(leaves), x) / 2).softmax(1)
    value = segmentation_loss(logits, y).mean() + 0.5 * 4 * (p * (p / student).log()).sum(1).mean()
    g = torch.autograd.grad(value, list(leaves.values()))
    expected = {name: v - 0.1 * own for (name, v), own in zip(start.items(), g, strict=True)}
    assert S.norm(S.sub(end, expected)) < 1e-10 * S.norm(S.sub(expected, start))


def test_an_adapter_without_a_private_branch_is_refused():
    model, state, x, _ = setting("lora")
    with pytest.raises(FedloraError, match="private branch, factors 'B_own'"):
        Distill().penalty(state, context(model, state, x))
