"""SOR's forms against dense products and NumPy; whom it moves, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_mini.adapters.base import Key, keys, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.metrics.leakage import changes, leak_cos2, subspace_overlap, travelling
from fedlora_mini.regularizers import Context
from fedlora_mini.regularizers.subspace import SOR, exact, oriented, proxy, subspace
from fedlora_mini.state import add, clone, norm, sub

M, N, R = 12, 9, 3
DRIFT = ("proxy", "exact", "subspace")
SIDES = {"encoder": "B", "decoder": "A"}  # IAT: the factor that travels
both_regions = pytest.mark.parametrize("region", SIDES)
all_forms = pytest.mark.parametrize("form", [*DRIFT, "dual"])
drift_forms = pytest.mark.parametrize("form", DRIFT)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(regions=("encoder", "decoder"), dtype=torch.float64, own=False):
    """(state, context) of layers "L0", "L1", …: the state some way from the round's start."""
    state, table = {}, {}
    for k, region in enumerate(regions):
        for j, role in enumerate(("A", "B", "A_own", "B_own") if own else ("A", "B")):
            state[f"L{k}.{role}"] = draw(*((R, N) if role[0] == "A" else (M, R)), seed=10 * k + j).to(dtype)
            table[f"L{k}.{role}"] = Key(f"L{k}", role, region, "linear")
    start = {
        name: value + 0.3 * draw(*value.shape, seed=100 + k).to(dtype) for k, (name, value) in enumerate(state.items())
    }
    return state, Context(2, 1, start, table, 0.1)


def noted(term, state, context, steps=1):
    """The context after `steps` optimiser steps that left the client at `state`."""
    with torch.no_grad():
        for _ in range(steps):
            term.prox_(state, context)
    return context


def dense(state, context, region, path):
    """Change of W by the shared factor and by the private one, as matrices."""
    A, B, A0, B0 = (s[f"{path}.{f}"] for s in (state, context.start) for f in "AB")
    by = {"B": (B - B0) @ A0, "A": B0 @ (A - A0)}
    shared = SIDES[region]
    return by[shared].detach().numpy(), by["A" if shared == "B" else "B"].detach().numpy()


def leaves(state):
    return {name: value.clone().requires_grad_() for name, value in state.items()}


# ---------------------------------------------------------------- values


@both_regions
def test_the_proxies_have_the_inner_product_of_the_updates_but_not_their_norms(region):
    """Chapter 11. In the decoder Q_sh = (A - A_0) A_0ᵀ and Q_lo = B_0ᵀ δB."""
    state, c = setting([region])
    shared, private = dense(state, c, region, "L0")
    A, B, A0, B0 = (s[f"L0.{f}"] for s in (state, c.start) for f in "AB")
    if region == "encoder":
        P_sh, P_lo = B0.T @ (B - B0), (A - A0) @ A0.T
    else:
        P_sh, P_lo = (A - A0) @ A0.T, B0.T @ (B - B0)
    dot = float((P_sh * P_lo).sum())
    assert dot == pytest.approx((shared * private).sum(), rel=1e-10)
    value = SOR(1.0, "proxy", beta=0.0).penalty(state, noted(SOR(1.0, "proxy", beta=0.0), state, c))
    assert value.item() == pytest.approx((dot / float(P_sh.norm() * P_lo.norm())) ** 2, rel=1e-6)
    cosine2 = (shared * private).sum() ** 2 / ((shared**2).sum() * (private**2).sum())
    assert value.item() != pytest.approx(cosine2, rel=0.1)


@both_regions
def test_exact_is_the_squared_cosine_of_the_updates_and_so_m2(region):
    state, c = setting([region])
    shared, private = dense(state, c, region, "L0")
    cosine2 = (shared * private).sum() ** 2 / ((shared**2).sum() * (private**2).sum())
    term = SOR(0.5, "exact")
    assert term.penalty(state, noted(term, state, c, 3)).item() == pytest.approx(0.5 * cosine2, rel=1e-6)
    [pair] = changes(c.start, state, travelling(c.keys)).values()
    assert leak_cos2(*pair) == pytest.approx(cosine2, rel=1e-10)


@both_regions
def test_subspace_is_the_overlap_of_the_column_spaces_by_numpys_qr(region):
    """Columns of W in the encoder, rows in the decoder."""
    state, c = setting([region])
    shared, private = dense(state, c, region, "L0")
    if region == "decoder":
        shared, private = shared.T, private.T
    Q_s, Q_l = (np.linalg.qr(U[:, :R])[0] for U in (shared, private))  # any r columns of a rank-r matrix span it
    term = SOR(1.0, "subspace")
    value = term.penalty(state, noted(term, state, c)).item()
    assert value == pytest.approx(np.linalg.norm(Q_s.T @ Q_l) ** 2 / R, rel=1e-5)
    assert value == pytest.approx(subspace_overlap(torch.tensor(shared), torch.tensor(private)), rel=1e-5)


def test_dual_is_the_squared_cosine_of_the_two_branches():
    state, c = setting(own=True)
    total = 0.0
    for path in ("L0", "L1"):
        X, Y = (state[f"{path}.B{o}"] @ state[f"{path}.A{o}"] for o in ("", "_own"))
        total += float((X * Y).sum() ** 2 / (X.square().sum() * Y.square().sum()))
    assert SOR(0.1, "dual").penalty(state, c).item() == pytest.approx(0.1 * total, rel=1e-6)
    same = {name: state[name.replace("_own", "")] for name in state}
    assert SOR(1.0, "dual").penalty(same, c).item() == pytest.approx(2, rel=1e-6)


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_counts_between_zero_and_one_and_layers_are_added_or_averaged(form, dtype):
    regions = ("encoder", "encoder", "decoder")
    for move in (1.0, 1e-3):
        state, c = setting(regions, dtype, own=form == "dual")
        state = add(c.start, sub(state, c.start), move)
        values = {}
        for reduce in ("sum", "mean"):
            term = SOR(1.0, form, reduce=reduce)
            found = torch.stack(term.overlaps(state, noted(term, state, c)))
            assert found.dtype == dtype and found.shape == (3,) and (found > 0).all() and (found <= 1 + 1e-6).all()
            values[reduce] = term.penalty(state, c).item()
            assert values[reduce] == pytest.approx(found.sum().item() / (1 if reduce == "sum" else 3))


@pytest.mark.parametrize("form", ["exact", "subspace"])
def test_a_private_factor_that_follows_the_shared_one_costs_everything(form):
    """B - B_0 = B_0, A - A_0 = A_0: both changes of W are B_0 A_0."""
    state, c = setting()
    state = add(c.start, c.start)
    term = SOR(1.0, form)
    assert term.penalty(state, noted(term, state, c)).item() == pytest.approx(2, rel=1e-6)


@drift_forms
def test_in_the_first_round_and_step_it_is_off_with_a_zero_gradient(form):
    """B_0 = 0; no drift yet; nothing shared has moved: no NaN from a norm of zero."""
    state, c = setting()
    term = SOR(1.0, form)
    zero = {name: torch.zeros_like(v) if name.endswith("B") else v for name, v in c.start.items()}
    first = replace(c, start=zero, memory={})
    for context, now in (
        (noted(term, state, first), state),  # round 0
        (replace(c, memory={}), state),  # before a step
        (noted(term, state, replace(c, memory={})), clone(c.start)),  # B is back at B_0, A too
        (noted(term, state, first), zero),
    ):
        held = leaves(now)
        value = term.penalty(held, context)
        gradients = torch.autograd.grad(value, list(held.values()), allow_unused=True)
        assert value == 0 and not any(g.any() for g in gradients if g is not None)


def test_dual_is_off_while_a_branch_is_zero():
    state, c = setting(["encoder"], own=True)
    for dead in ("B", "B_own"):
        held = leaves({**state, f"L0.{dead}": torch.zeros(M, R, dtype=torch.float64)})
        value = SOR(1.0, "dual").penalty(held, c)
        value.backward()
        assert value == 0 and all(not p.grad.any() for p in held.values() if p.grad is not None)


@drift_forms
def test_a_column_that_has_not_moved_has_a_finite_gradient(form):
    state, c = setting(["encoder"])
    state["L0.B"][:, 1] = c.start["L0.B"][:, 1]
    term = SOR(1.0, form)
    held = leaves(state)
    term.penalty(held, noted(term, state, c)).backward()
    assert torch.isfinite(held["L0.B"].grad).all() and held["L0.B"].grad.any()


# ---------------------------------------------------------------- the drift


def test_the_drift_is_an_exponential_average_of_displacements_within_a_round():
    _, c = setting()
    path, term, average = "L0", SOR(beta=0.8), torch.zeros(R, N, dtype=torch.float64)
    for step in range(5):
        state = {name: draw(*v.shape, seed=step) for name, v in c.start.items()}
        kept = clone(state)
        noted(term, state, c)
        assert all(torch.equal(state[name], kept[name]) for name in state)
        average = 0.8 * average + 0.2 * (state[f"{path}.A"] - c.start[f"{path}.A"])
    A0 = c.start[f"{path}.A"]
    B, B0 = state[f"{path}.B"], c.start[f"{path}.B"]
    expected = proxy(B, B0, A0, average, 1e-8), exact(B, B0, A0, average, 1e-8)
    assert torch.allclose(term.overlaps(state, c)[0], expected[0], rtol=1e-12)
    assert not torch.allclose(expected[0], proxy(B, B0, A0, state[f"{path}.A"] - A0, 1e-8), rtol=1e-3)
    assert term.overlaps(state, replace(c, memory={}))[0] == 0  # a new round starts from nothing
    both = noted(SOR(beta=0.5), state, c)
    assert torch.allclose(term.overlaps(state, both)[0], expected[0], rtol=1e-12)  # two terms, two averages


# ---------------------------------------------------------------- gradients


@all_forms
@pytest.mark.parametrize(("encoder", "decoder"), [("B", "A"), ("A", "B"), ("A", "A"), ("B", "B")])
def test_only_shared_factors_get_a_gradient(form, encoder, decoder):
    state, c = setting(own=form == "dual")
    term = SOR(1.0, form, encoder=encoder, decoder=decoder)
    held = leaves(state)
    term.penalty(held, noted(term, held, c)).backward()
    shared = {f"L0.{encoder}", f"L1.{decoder}"} if form != "dual" else {f"L{k}.{f}" for k in (0, 1) for f in "AB"}
    for name, p in held.items():
        assert (p.grad is not None and bool(p.grad.any())) if name in shared else p.grad is None


@all_forms
@both_regions
def test_gradients_agree_with_finite_differences(form, region):
    state, c = setting([region], own=form == "dual")
    term = SOR(0.7, form)
    noted(term, state, c)
    names = ["L0.A", "L0.B"] if form == "dual" else [f"L0.{SIDES[region]}"]

    def value(*tensors):
        return term.penalty({**state, **dict(zip(names, tensors, strict=True))}, c)

    assert torch.autograd.gradcheck(value, tuple(state[name].clone().requires_grad_() for name in names))


@both_regions
@drift_forms
def test_the_proxys_gradient_lies_in_the_start_factors_own_space(form, region):
    """On B in col(B_0), on A in row(A_0): it moves the shared factor in r of m (or n) directions, the others in all."""
    state, c = setting([region])
    term, shared = SOR(1.0, form), f"L0.{SIDES[region]}"
    held = leaves(state)
    term.penalty(held, noted(term, state, c)).backward()
    gradient, basis = held[shared].grad, c.start[shared]
    if region == "decoder":
        gradient, basis = gradient.T, basis.T
    Q = torch.linalg.qr(basis)[0]
    outside = (gradient - Q @ (Q.T @ gradient)).norm() / gradient.norm()
    assert outside < 1e-12 if form == "proxy" else outside > 0.01


@drift_forms
def test_descent_on_it_lowers_m2(form):
    """M2 is of the changes of W themselves: also for the proxy, whose cosine is another one."""
    state, c = setting(["encoder"])
    B0, A0 = c.start["L0.B"], c.start["L0.A"]
    state = {"L0.B": 1.3 * B0 + 0.1 * draw(M, R, seed=8), "L0.A": 1.2 * A0 + 0.1 * draw(R, N, seed=9)}
    term = SOR(1.0, form)
    noted(term, state, c)
    B, values = state["L0.B"].clone().requires_grad_(), []
    for _ in range(1000):
        values.append(leak_cos2(*changes(c.start, {**state, "L0.B": B.detach()}, {"L0": "B"})["L0"]))
        [gradient] = torch.autograd.grad(term.penalty({**state, "L0.B": B}, c), [B])
        B = (B - 0.1 * gradient).detach().requires_grad_()
    assert values[0] > 0.5 and values[-1] < 0.02 * values[0]


def test_orthogonal_proxies_leave_most_directions_shared():
    """`exact` takes one number of r² to zero; `subspace` still sees the same r directions."""
    state, c = setting(["encoder"])
    B0, A0 = c.start["L0.B"], c.start["L0.A"]
    dA = state["L0.A"] - A0
    C = draw(R, R, seed=3)
    weight = B0.T @ B0 @ dA @ A0.T
    C = C - weight * (C * weight).sum() / weight.square().sum()  # ⟨B_0 C A_0, B_0 δA⟩ = 0
    D = B0 @ C
    assert exact(B0 + D, B0, A0, dA, 1e-8) < 1e-20
    assert subspace(B0 + D, B0, A0, dA, 1e-8).item() == pytest.approx(1, rel=1e-5)


# ---------------------------------------------------------------- in training


@drift_forms
def test_training_with_it_lowers_m2_of_a_network(adapted, fit, form):
    model = adapted(LoRA, noise=0.2, rank=2)
    start, values = trainable(model), []
    for terms in ((), (SOR(1e-2, form),)):
        [end] = fit(model, *terms, steps=30, lr=3e-3)
        pairs = changes(start, end, travelling(keys(model, list(start))))
        values.append(np.mean([leak_cos2(*pair) for pair in pairs.values()]))
    assert values[1] < 0.7 * values[0]


@drift_forms
def test_a_client_on_the_group_axis_trains_as_alone(adapted, fit, form):
    """Each client has its own start, drift and gradient."""
    model = adapted(LoRA, torch.float64, noise=0.2, rank=2)
    term = SOR(1.0, form)
    alone, together = (fit(model, term, clients=3, grouped=g, steps=4, optimiser="sgd") for g in (False, True))
    free = fit(model, clients=3, steps=4, optimiser="sgd")
    for one, grouped, without in zip(alone, together, free, strict=True):
        assert norm(sub(one, grouped)) < 1e-9 * norm(one)
        assert norm(sub(one, without)) > 1e-6 * norm(one)


def test_with_weight_zero_training_is_as_without(adapted, fit):
    model = adapted(LoRA, noise=0.2, rank=2)
    ends = [fit(model, *terms)[0] for terms in ((), (SOR(0.0),))]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---------------------------------------------------------------- refusals


def test_layers_without_a_plain_pair_are_refused(adapted, fit):
    with pytest.raises(FedloraError, match="'SOR proxy, lambda 0\\.1' needs layers of encoder"):
        fit(adapted(Diagonal, rank=2), SOR())
    with pytest.raises(FedloraError, match="A_own and B_own"):
        fit(adapted(LoRA, rank=2), SOR(form="dual"))


def test_unknown_settings_are_refused():
    with pytest.raises(FedloraError, match="Did you mean 'exact'"):
        SOR(form="exakt")
    with pytest.raises(FedloraError, match="accepted: mean, sum"):
        SOR(reduce="max")
    with pytest.raises(FedloraError, match="unknown shared factor 'C'; accepted: A, B"):
        SOR(encoder="C")
    with pytest.raises(FedloraError, match="beta"):
        SOR(beta=1.0)


def test_the_decoder_is_the_encoder_of_the_transposed_layer():
    state, _ = setting(["decoder"])
    shared, private = oriented(state, "L0", "A")
    assert torch.equal(private.T @ shared.T, state["L0.B"] @ state["L0.A"]) and shared.shape == (N, R)
