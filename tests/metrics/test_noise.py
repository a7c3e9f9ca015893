"""Noise in B A: every term against the formed matrices, the moments against brute force, and claim L1's equality."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.adapters import LoRA, call, prepare, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.metrics.noise import (
    NoiseEnergy,
    coupling_cosine,
    couplings,
    energy,
    expected_energy,
    injected_energy,
    noisy_steps,
    random_walk,
    state_energy,
)
from fedlora_mini.models import build

M, N, R = 24, 30, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(seed=0):
    return [torch.Generator().manual_seed(2 * seed + k) for k in range(2)]


def values(e):
    return np.array([e.from_B, e.from_A, e.product, e.total])


B, A = 0.3 * draw(M, R), 0.2 * draw(R, N, seed=1)


def test_every_term_is_that_of_the_formed_matrices():
    N_B, N_A = 0.5 * draw(M, R, seed=2), 0.1 * draw(R, N, seed=3)
    whole = (B + N_B) @ (A + N_A) - B @ A
    dense = [N_B @ A, B @ N_A, N_B @ N_A, whole]
    assert torch.allclose(whole, N_B @ A + B @ N_A + N_B @ N_A)
    assert np.allclose(values(energy(B, A, N_B, N_A)), [float(x.square().sum()) for x in dense], rtol=1e-10)
    batch = energy(B, A, torch.stack([N_B, 2 * N_B]), torch.stack([N_A, N_A]))
    assert batch.from_B == pytest.approx(2.5 * float(dense[0].square().sum()))
    assert batch.from_A == pytest.approx(float(dense[1].square().sum()))


def test_the_closed_form_is_the_mean_of_brute_force():
    std_B, std_A, draws = 0.3, 0.2, 4000
    N_B, N_A = std_B * draw(draws, M, R, seed=4), std_A * draw(draws, R, N, seed=5)
    dense = [N_B @ A, B @ N_A, N_B @ N_A, (B + N_B) @ (A + N_A) - B @ A]
    brute = [float(x.square().sum((1, 2)).mean()) for x in dense]
    assert np.allclose(values(energy(B, A, N_B, N_A)), brute, rtol=1e-10)
    assert np.allclose(values(expected_energy(B, A, std_B, std_A)), brute, rtol=0.01)


def test_the_scale_enters_squared_and_steps_add_variances():
    once, often = expected_energy(B, A, 0.1, 0.2, scale=3.0), expected_energy(B, A, 0.3, 0.2, (1, 4))
    assert np.allclose(values(once), 9 * values(expected_energy(B, A, 0.1, 0.2)))
    assert np.allclose(values(often), values(expected_energy(B, A, 0.1 * 3, 0.2 * 2)))


# ---------------------------------------------------------------- claim L1: simultaneous(K) > alternating(K) = (K/2)


@pytest.mark.parametrize("steps", [2, 8, 20])
def test_alternating_steps_inject_what_half_as_many_simultaneous_ones_do(steps):
    """Exactly: with the same noise the factors end at the same bits."""
    alternating = random_walk(B, A, 0.02, 0.03, "alternating", steps, generators())
    half = random_walk(B, A, 0.02, 0.03, "simultaneous", steps // 2, generators())
    assert torch.equal(alternating[0], half[0]) and torch.equal(alternating[1], half[1])
    assert not torch.equal(alternating[0][0], B) and not torch.equal(alternating[1][0], A)
    assert noisy_steps("alternating", steps) == noisy_steps("simultaneous", steps // 2) == (steps // 2, steps // 2)


def test_one_step_of_each_factor_leaves_the_same_product_noise_as_one_of_both():
    both = random_walk(B, A, 0.1, 0.1, "simultaneous", 1, generators())
    each = random_walk(B, A, 0.1, 0.1, "alternating", 2, generators())
    N_B, N_A = both[0] - B, both[1] - A
    assert torch.equal(both[0] @ both[1], each[0] @ each[1])
    assert energy(B, A, N_B, N_A).product > 0
    first = random_walk(B, A, 0.1, 0.1, "alternating", 1, generators())  # a single step has none
    assert energy(B, A, first[0] - B, first[1] - A).product == 0


def test_the_pattern_of_the_three_schedules():
    """Card 0.3: 1 : 1 : 3 at K = 20, where linear and product terms of ten steps are of one size."""
    B0, A0 = draw(64, 8, seed=7), draw(8, 64, seed=8)
    arms = {"simultaneous": ("simultaneous", 20), "alternating": ("alternating", 20), "half": ("simultaneous", 10)}
    found = {}
    for k, (name, (schedule, steps)) in enumerate(arms.items()):
        found[name] = injected_energy(B0, A0, 0.45, schedule, steps, generators(k + 1), draws=100)
        closed = expected_energy(B0, A0, 0.45, 0.45, noisy_steps(schedule, steps))
        assert np.allclose(values(found[name]), values(closed), rtol=0.03)
    total = {name: e.total for name, e in found.items()}
    assert total["alternating"] == pytest.approx(total["half"], rel=0.03)
    assert total["simultaneous"] == pytest.approx(3 * total["half"], rel=0.05)
    ratios = [getattr(found["simultaneous"], t) / getattr(found["half"], t) for t in ("from_B", "from_A", "product")]
    assert np.allclose(ratios, [2, 2, 4], rtol=0.05)


def test_one_factor_alone_has_no_product_noise():
    assert noisy_steps("B only", 7) == (7, 0)
    e = injected_energy(B, A, 0.1, "B only", 7, generators(), draws=5)
    assert e.product == 0 == e.from_A and e.total == pytest.approx(e.from_B)
    assert noisy_steps("alternating", 7) == (4, 3)


def test_an_unknown_schedule_is_named():
    with pytest.raises(FedloraError, match="alternating"):
        noisy_steps("alternate", 3)


def test_the_model_s_energy_is_the_sum_over_its_layers():
    model = prepare(build("minisam", 2, d=16, depth=1, stem=8, width=8), "lora", 0, rank=2, alpha=6.0)
    state = {n: draw(*v.shape, seed=k).float() for k, (n, v) in enumerate(trainable(model).items())}
    total = np.zeros(4)
    for path, layer in model.named_modules():
        if isinstance(layer, LoRA):
            b, a = state[f"{path}.B"], state[f"{path}.A"]
            total += values(expected_energy(b, a, 0.1, 0.2, (3, 2), scale=3.0))
    assert np.allclose(values(state_energy(model, state, 0.1, 0.2, (3, 2))), total) and total.all()
    with pytest.raises(FedloraError, match="no LoRA layer"):
        state_energy(nn.Linear(2, 2), {}, 0.1, 0.1)
    assert NoiseEnergy(1, 2, 3, 6) + NoiseEnergy(1, 1, 1, 3) == NoiseEnergy(2, 3, 4, 9)


# ---------------------------------------------------------------- coupling


def test_the_cosine_is_that_of_the_formed_matrices():
    g_B, g_A = draw(M, R, seed=2), draw(R, N, seed=3)
    X, Y = g_B @ A, B @ g_A
    assert coupling_cosine(B, A, g_B, g_A) == pytest.approx(float((X * Y).sum() / X.norm() / Y.norm()), rel=1e-10)
    assert coupling_cosine(torch.zeros_like(B), A, g_B, g_A) == 0.0


def test_exact_gradients_are_never_opposed():
    for seed in range(20):
        G = draw(M, N, seed=seed)
        assert coupling_cosine(B, A, G @ A.T, B.T @ G) >= 0
    assert coupling_cosine(B, A, -(B @ A @ A.T), B.T @ (B @ A)) < 0  # others may be


def test_couplings_of_a_model_s_gradient():
    model = prepare(build("minisam", 2, d=16, depth=1, stem=8, width=8), "lora", 0, rank=2)
    state = {n: 0.1 * draw(*v.shape, seed=k).float() for k, (n, v) in enumerate(trainable(model).items())}
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    x, y = draw(2, 3, 32, 32).float(), torch.arange(2).repeat(2, 32, 16)
    loss = segmentation_loss(call(model, leaves, x), y).mean()
    gradient = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = couplings(state, gradient)
    assert len(found) == sum(name.endswith(".A") for name in state) > 3
    assert all(0 < cosine < 1 for cosine in found.values())
    assert couplings(state, {n: g for n, g in gradient.items() if n.endswith(".B")}) == {}
