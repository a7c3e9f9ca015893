"""The batched segmentation against plain loops, the theory's case in closed form, and claim I1 in small worlds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import tissues, worlds
from fedlora_mini.experiments.rotation import optimal_error, site_updates
from fedlora_mini.experiments.tissues import (
    LABELS,
    SIZE,
    STRIDE,
    TEST,
    TISSUES,
    Regime,
    compare,
    dice,
    draw_worlds,
    errors,
    fit,
    logits,
)
from fedlora_mini.experiments.worlds import ARMS, FLIP, SHIFTS

SMALL = Regime(sites=3, images=1, r=2)
SHARED = {
    "iat": {"encoder.B", "decoder.A"},
    "anti_iat": {"encoder.A", "decoder.B"},
    "fedsa": {"encoder.A", "decoder.A"},
    "inverse_fedsa": {"encoder.B", "decoder.B"},
    "fedit": {"encoder.A", "encoder.B", "decoder.A", "decoder.B"},
    "local": set(),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---------------------------------------------------------------- worlds


@pytest.mark.parametrize("shift", SHIFTS)
def test_worlds_are_the_same_but_for_the_shift(shift):
    world, plain = (draw_worlds(replace(SMALL, shift=name), 2) for name in (shift, "none"))
    turned, relabelled = SHIFTS[shift]
    assert all(torch.equal(world.frozen[k], plain.frozen[k]) for k in plain.frozen)
    for name in ("x", "test_x"):
        assert torch.allclose(getattr(world, name), world.R @ getattr(plain, name), atol=1e-5)
        assert torch.allclose(getattr(world, name), getattr(plain, name), atol=1e-5) == (not turned)
    for name in ("y", "test_y"):  # without a shift a label is the tissue
        flat = getattr(plain, name)
        mine = [[world.codes[v, k][flat[v, k]] for k in range(3)] for v in range(2)]
        assert torch.equal(getattr(world, name), torch.stack([torch.stack(row) for row in mine]))
        assert torch.equal(getattr(world, name), flat) == (not relabelled)
    assert flat.shape[-1] == TEST * SIZE**2 and world.y.shape[-1] == (SIZE // STRIDE) ** 2


@pytest.mark.parametrize("moved", [0, 2, 5])
def test_a_site_moves_as_many_tissues_as_asked_to_labels_that_the_base_does_not_use(moved):
    codes = draw_worlds(replace(SMALL, shift="supervision", moved=moved, sites=20), 2).codes.flatten(0, 1)
    own = codes != torch.arange(TISSUES)
    assert (own.sum(1) == moved).all() and (codes[own] >= TISSUES).all() and codes.max() < LABELS
    assert all(len(set(row.tolist())) == TISSUES for row in codes)
    different = len({tuple(row.tolist()) for row in codes})  # of 40; by chance a few agree
    assert different == 1 if moved == 0 else different > 30


def test_the_frozen_network_solves_the_task_without_shifts_and_no_other():
    score = {shift: dice(w := draw_worlds(replace(SMALL, shift=shift), 3), fit(w, "local", 2, 0)) for shift in SHIFTS}
    assert score["none"].min() > 0.85
    assert max(score[shift].mean() for shift in SHIFTS if shift != "none") < 0.4 and not score["supervision"].any()


# ---------------------------------------------------------------- one forward, one round


def test_logits_are_those_of_stem_mean_relu_and_head_pixel_by_pixel(monkeypatch):
    seen, smooth = [], tissues.smooth
    monkeypatch.setattr(tissues, "smooth", lambda images: seen.append(images) or smooth(images))
    world, v, k = draw_worlds(SMALL, 2), 1, 2
    state = fit(world, "iat", 2, rounds=1, steps=2, lr=0.1)
    W, H = (world.frozen[g][v, 0] + state[f"{g}.B"][v, k] @ state[f"{g}.A"][v, k] for g in ("encoder", "decoder"))
    raw = seen[-1][v, k, SMALL.images]  # the first test image, before site k's scanner: (C, SIZE, SIZE)
    stem = {(y, x): W @ world.R[v, k] @ raw[:, y, x] for y in range(SIZE) for x in range(SIZE)}
    found = logits(world.frozen, state, world.test_x)[v, k]
    for y, x in [(0, 0), (0, 7), (23, 23), (11, 12), (5, 0), (20, 3)]:
        around = [stem[j, i] for j in range(y - 1, y + 2) for i in range(x - 1, x + 2) if (j, i) in stem]
        hidden = [max(0.0, float(sum(s[c] for s in around)) / len(around)) for c in range(16)]
        for label in range(LABELS):
            value = sum(float(H[label, c]) * hidden[c] for c in range(16))
            assert float(found[label, SIZE * y + x]) == pytest.approx(value, rel=1e-3, abs=1e-3)


def one_by_one(world, v, shared, rounds, steps, lr, start):
    """World v by a loop over sites, every site with its own Adam: each site's factors."""
    K = world.x.shape[1]
    sites = [{name: value.clone().requires_grad_() for name, value in start.items()} for _ in range(K)]
    for t in range(rounds):
        for k, p in enumerate(sites):
            adam = torch.optim.Adam(p.values())
            for s in range(steps):
                adam.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * (t * steps + s) / (rounds * steps)))
                W, H = (world.frozen[g][v, 0] + p[f"{g}.B"] @ p[f"{g}.A"] for g in ("encoder", "decoder"))
                out = (H @ torch.clamp(W @ world.x[v, k], min=0)).T  # (pixels, L)
                chosen = torch.stack([row[label] for row, label in zip(out, world.y[v, k], strict=True)])
                loss = (out.exp().sum(1).log() - chosen).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
        for name in shared:
            mean = sum(p[name].detach() for p in sites) / K
            for p in sites:
                p[name].data.copy_(mean)
    return sites


@pytest.mark.parametrize("arm", ARMS)
def test_all_worlds_and_sites_at_once_train_as_one_by_one(arm, monkeypatch):
    starts, draw_start = [], worlds.kaiming_uniform
    monkeypatch.setattr(worlds, "kaiming_uniform", lambda *a: starts.append(draw_start(*a)) or starts[-1])
    world, v = draw_worlds(SMALL, 2), 1
    state = fit(world, arm, 2, rounds=2, steps=2, lr=0.03)
    start = {f"{g}.A": A[v, 0] for g, A in zip(("encoder", "decoder"), starts, strict=True)}
    start |= {"encoder.B": torch.zeros(16, 2), "decoder.B": torch.zeros(LABELS, 2)}
    for k, site in enumerate(one_by_one(world, v, SHARED[arm], 2, 2, 0.03, start)):
        for name, value in site.items():
            assert torch.allclose(state[name][v, k], value, atol=1e-4), (name, k)


@pytest.mark.parametrize("arm", ARMS)
def test_after_a_round_shared_factors_are_equal_at_all_sites_and_private_ones_differ(arm):
    for name, value in fit(draw_worlds(SMALL, 2), arm, 2, rounds=1, steps=3).items():
        equal = torch.equal(value, value[:, :1].expand_as(value))
        assert equal == (name in SHARED[arm]), name


def test_dice_is_the_overlap_of_each_tissue_in_the_sites_own_labels():
    world = draw_worlds(SMALL, 2)
    state = fit(world, "local", 2, rounds=2, lr=0.1)
    found, score = logits(world.frozen, state, world.test_x).argmax(2), dice(world, state)
    assert 0.05 < score.min() < score.max() < 0.95
    for v in range(2):
        for k in range(3):
            each = []
            for label in world.codes[v, k].tolist():
                a, b = found[v, k] == label, world.test_y[v, k] == label
                each.append(2 * int((a & b).sum()) / int(a.sum() + b.sum()))
            assert score[v, k] == pytest.approx(np.mean(each))


# ---------------------------------------------------------------- the theory's case


def ideal(world, r):
    """The best factors of rank r with one B in the stem, U A_k = W (R_kᵀ - 1), and one A in the head."""
    out = {}
    U, s, V = torch.linalg.svd(world.frozen["encoder"].double())
    turn = world.R.double().mT - torch.eye(16)
    out["encoder.B"] = U[..., :r].expand(-1, world.R.shape[1], -1, -1)
    out["encoder.A"] = s[..., :r, None] * V[..., :r, :] @ turn
    U, s, V = torch.linalg.svd(world.frozen["decoder"].double())
    out["decoder.A"] = V[..., :r, :].expand(-1, world.R.shape[1], -1, -1)
    out["decoder.B"] = (permutation(world) - torch.eye(LABELS)) @ U[..., :r] * s[..., None, :r]
    return {name: value.float() for name, value in out.items()}


def permutation(world):
    """P_k, which moves row t to row code_k(t) and clears it: (V, K, L, L)."""
    P = torch.zeros(*world.codes.shape[:2], LABELS, LABELS, dtype=torch.float64)
    for v, k, t in np.ndindex(*world.codes.shape):
        P[v, k, world.codes[v, k, t], t] = 1
    return P


def test_one_b_in_the_stem_and_one_a_in_the_head_of_rank_four_solve_every_site_exactly():
    world, plain = draw_worlds(SMALL, 2), draw_worlds(replace(SMALL, shift="none"), 2)
    state, base = ideal(world, 4), fit(plain, "local", 2, rounds=0)
    for name in ("encoder.B", "decoder.A"):
        assert torch.equal(state[name], state[name][:, :1].expand_as(state[name]))
    found, wanted = logits(world.frozen, state, world.test_x), logits(plain.frozen, base, plain.test_x)
    assert torch.allclose(found, permutation(world).float() @ wanted, atol=1e-3)
    assert np.allclose(dice(world, state), dice(plain, base))
    assert dice(world, ideal(world, 2)).mean() < dice(world, state).mean() - 0.1


def test_what_sites_need_lies_in_four_common_columns_of_the_stem_and_rows_of_the_head():
    world = draw_worlds(SMALL, 1)
    still = {n: torch.eye(n, dtype=torch.float64).expand(1, 3, n, n) for n in (LABELS, 16)}
    for region, R, T, exact, other in (
        ("encoder", world.R.double(), still[16], "B", "A"),
        ("decoder", still[16], permutation(world), "A", "B"),
    ):
        W = world.frozen[region][:, 0].double()
        needed = site_updates(torch.zeros_like(W), R, T, W, rho=1.0)
        assert float(optimal_error(needed, 4, exact)) < 1e-10 < 0.05 < float(optimal_error(needed, 4, other))
        assert float(optimal_error(needed, 3, exact)) > 1e-3


# ---------------------------------------------------------------- what it shows


def test_the_preference_for_a_factor_flips_with_the_shift():
    """I1 at r = 2, theta 2, each arm at the better of two rates."""
    found = compare(replace(SMALL, sites=4, images=2), FLIP, count=3, rounds=15, lr=(0.1, 0.3))
    assert found["appearance: B over A"].mean > 0.02 and found["supervision: A over B"].mean > 0.02
    assert found["interaction"].mean > 0.1


def test_one_model_for_all_fails_under_both_shifts_and_private_factors_cost_without_any():
    regime = replace(SMALL, sites=4)
    both, none = (errors(replace(regime, shift=s), ("iat", "fedit"), 3, 10, 0.1) for s in ("both", "none"))
    assert both["fedit"].mean() > 0.5 > both["iat"].mean()
    assert none["iat"].mean() > none["fedit"].mean() + 0.01


def test_unknown_names_are_refused():
    with pytest.raises(FedloraError, match="Did you mean 'supervision'"):
        Regime(shift="supervison")
    with pytest.raises(FedloraError, match="moved from 0 to 5"):
        Regime(moved=6)
    with pytest.raises(FedloraError, match="unknown arm 'pooled'"):
        fit(draw_worlds(SMALL, 1), "pooled", 2)
