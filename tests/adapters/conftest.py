"""Oracles for what every adapter promises, on one layer and inside a network: runs one after the other."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters import adapters, call, inject, merge, trainable, unmerge
from fedlora_mini.adapters.base import Adapter, Make, Where, freeze
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.adapters.io import load, save
from fedlora_mini.losses import segmentation_loss


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adapters inside Swin UNETR, the slowest network, are left to `make unit`."""
    for item in items:
        if item.name.startswith("test_inside_networks") and "swin_unetr" in item.name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    """Relative error of a against b."""
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-30)) < tolerance


def loss(y: Tensor) -> Tensor:
    """One number per row."""
    return (y.tanh() + 0.1 * y**2).flatten(1).sum(1)


def random_like(state: S.State, seed: int) -> S.State:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(v.shape, generator=g).to(v) for name, v in state.items()}


def randomise(model: nn.Module, seed: int = 0, size: float = 1.0) -> nn.Module:
    """Every factor a normal number, so that no start hides a term."""
    with torch.no_grad():
        for name, value in random_like(trainable(model), seed).items():
            model.get_parameter(name).copy_(size * value)
    return model


def groups_are_apart(module: nn.Module, x: Tensor) -> None:
    """G blocks of rows, a state each, for every G that divides the rows: outputs and gradients of G separate runs."""
    own = trainable(module)
    for G in (g for g in range(1, len(x) + 1) if len(x) % g == 0):
        states = [random_like(own, seed) for seed in range(G)]
        stacked = {name: value.requires_grad_() for name, value in S.stack(states).items()}
        y = call(module, stacked, x)
        found = torch.autograd.grad(loss(y).sum(), list(stacked.values()))
        for g, (state, part) in enumerate(zip(states, x.chunk(G), strict=True)):
            leaves = {name: value.requires_grad_() for name, value in state.items()}
            alone = call(module, leaves, part)
            assert close(y.chunk(G)[g], alone), f"output of group {g} of {G}"
            expected = torch.autograd.grad(loss(alone).sum(), list(leaves.values()))
            for name, a, b in zip(leaves, found, expected, strict=True):
                assert a.shape == (G, *b.shape) and close(a[g], b), f"gradient of {name}, group {g} of {G}"
        for name in own:  # one factor by group, the others common
            mixed = states[0] | {name: stacked[name].detach()}
            for g, part in enumerate(x.chunk(G)):
                alone = call(module, states[0] | {name: states[g][name]}, part)
                assert close(call(module, mixed, x).chunk(G)[g], alone), f"only {name} by group, group {g} of {G}"


def rows_are_samples(module: nn.Module, x: Tensor) -> None:
    """One state seen by every sample: `per_sample_gradients` against a loop over rows of the batch."""
    randomise(module)
    state = trainable(module)
    found, _ = per_sample_gradients(module, state, lambda y, _: loss(y), x, x)
    for i in range(len(x)):
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        expected = torch.autograd.grad(loss(call(module, leaves, x[i : i + 1])).sum(), list(leaves.values()))
        for name, b in zip(leaves, expected, strict=True):
            assert close(found[name][i], b), f"gradient of {name}, row {i}"


def merging_is_exact(module: Adapter, x: Tensor) -> None:
    """Merged = unmerged to 1e-10, ΔW is what was folded in, unmerge restores every bit."""
    randomise(module)
    before, expected, delta = S.clone(module.base.state_dict()), module(x), module.delta()
    module.merge()
    assert module.merged and close(module(x), expected)
    assert torch.allclose(module.base.weight - before["weight"], delta, atol=1e-12)
    assert torch.allclose(module.delta(), delta, atol=1e-12)  # the same while merged
    module.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in module.base.state_dict().items())
    assert torch.equal(module(x), expected)


def starts_and_is_rebuilt(module: Adapter, x: Tensor) -> None:
    """The base to the bit at the start; the same again from a copy of the base, the config and the state."""
    if module.starts_at_base:
        assert torch.equal(module(x), module.base(x))
    twin = type(module)(copy.deepcopy(module.base), **module.config())
    randomise(module)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x)) and twin.config() == module.config()
    assert set(trainable(module)) == set(module.factors)
    assert {v.dtype for v in trainable(module).values()} == {x.dtype}
    assert not any(p.requires_grad for p in module.base.parameters())


def every_promise(module: Adapter, x: Tensor) -> None:
    starts_and_is_rebuilt(module, x)
    rows_are_samples(module, x)
    groups_are_apart(module, x)
    if module.merges:
        merging_is_exact(module, x)


def in_a_network(model: nn.Module, make: Make, where: Where, x: Tensor, folder: str) -> nn.Module:
    """The same inside a network in double precision, and: a deep copy is apart, a folder holds all of it."""
    plain = freeze(model.double())
    expected, bare = plain(x), copy.deepcopy(plain)
    inject(plain, make, where, among=(nn.Module,))
    if all(adapter.starts_at_base for _, adapter in adapters(plain)):
        assert torch.equal(plain(x), expected)
    twin = copy.deepcopy(plain)
    at_start = twin(x)
    randomise(plain, size=0.1)
    assert not close(plain(x), at_start, 1e-6)
    assert torch.equal(twin(x), at_start)  # the copy did not move

    y = (x.mean(1) > 0.5).to(torch.uint8)
    state = trainable(plain)
    found, _ = per_sample_gradients(plain, state, segmentation_loss, x, y)
    for i in range(len(x)):
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        alone = segmentation_loss(call(plain, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        row = dict(zip(leaves, torch.autograd.grad(alone, list(leaves.values())), strict=True))
        assert S.norm(S.sub({name: g[i] for name, g in found.items()}, row)) < 1e-8 * S.norm(row)

    expected = plain(x)
    assert close(merge(plain)(x), expected, 1e-8)
    unmerge(plain)
    loaded = load(bare, save(plain, folder))
    assert torch.equal(loaded(x), expected)
    return plain


@pytest.fixture
def oracle() -> SimpleNamespace:
    named: dict[str, Callable] = {
        f.__name__: f
        for f in (close, randomise, groups_are_apart, rows_are_samples, merging_is_exact, every_promise, in_a_network)
    }
    return SimpleNamespace(**named)
