"""The proximal step on v, its open choices one by one, and what it does to the rank of a known matrix."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora_mini.adapters.base import Key, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import Schedule, together
from fedlora_mini.regularizers import L1, Context, GroupLasso, WeightDecay
from fedlora_mini.regularizers.proximal import soft_threshold

M, N = 8, 10


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(start="unit", rank=6, seed=0, v=None):
    """Diagonal on a zero weight."""
    base = nn.Linear(N, M, bias=False).double()
    nn.init.zeros_(base.weight)
    adapter = Diagonal(base, rank, start=start, generator=torch.Generator().manual_seed(seed))
    if v is not None:
        nn.init.constant_(adapter.v, v)
    return adapter


def context(adapter, **fields):
    keys = {f"P.{role}": Key("P", role, "encoder", "linear") for role in adapter.factors}
    return Context(1, 1, {}, keys, 0.1, layers={"P": adapter}, **fields)


def product(state):
    return (state["P.B"] * state["P.v"]) @ state["P.A"]


def stepped(term, state, gradient, context):
    """`gradient_` and `prox_` with no optimiser between: what is left in the gradient, and the state after."""
    state, gradient = dict(state), dict(gradient)
    state = {name: value.clone() for name, value in state.items()}
    context = replace(context, moves=frozenset(gradient))
    term.gradient_(gradient, state, context)
    term.prox_(state, context)
    return gradient, state


@pytest.fixture
def one():
    """(adapter, state, gradient, context) with all factors away from zero."""
    adapter = layer("gate", 4)
    shapes = {"P.A": (4, N), "P.v": (4,), "P.B": (M, 4)}
    state, gradient = ({name: draw(*shape, seed=k) for name, shape in shapes.items()} for k in (0, 1))
    return adapter, state, gradient, context(adapter)


def test_the_step_is_a_gradient_step_and_a_threshold_and_v_is_taken_from_the_optimiser(one):
    _, state, gradient, c = one
    left, after = stepped(L1(0.5), state, gradient, c)
    assert set(left) == {"P.A", "P.B"}
    x = state["P.v"] - c.lr * gradient["P.v"]
    expected = [math.copysign(max(abs(a) - c.lr * 0.5, 0), a) for a in x.tolist()]
    assert after["P.v"].tolist() == pytest.approx(expected, abs=1e-15)
    assert torch.equal(after["P.A"], state["P.A"]) and torch.equal(after["P.B"], state["P.B"])


def test_a_large_lambda_gives_exact_zeros_and_a_strong_gradient_revives_them(one):
    _, state, gradient, c = one
    _, after = stepped(L1(1e3), state, gradient, c)
    assert not after["P.v"].any() and not product(after).any()
    strong = gradient | {"P.v": torch.tensor([1.0, -1.0, 0.1, 0.0], dtype=torch.float64)}
    _, again = stepped(L1(0.5), after, strong, c)  # back iff |grad| > lambda, for eta = rho
    assert again["P.v"].tolist() == pytest.approx([-0.05, 0.05, 0.0, 0.0])


def test_without_lambda_it_is_plain_sgd_on_v(one):
    _, state, gradient, c = one
    v = nn.Parameter(state["P.v"].clone())
    v.grad = gradient["P.v"]
    torch.optim.SGD([v], lr=c.lr).step()
    assert torch.allclose(stepped(L1(0.0), state, gradient, c)[1]["P.v"], v, rtol=1e-15)


def test_what_stands_still_keeps_its_bits(one):
    _, state, gradient, c = one
    del gradient["P.v"]
    for term in (L1(0.5), L1(0.5, gauge="unit"), L1.sora()):
        _, after = stepped(term, state, gradient, c)
        assert all(torch.equal(after[name], state[name]) for name in state)
    _, after = stepped(L1(0.5, gauge="unit"), state, {"P.v": draw(4), "P.B": draw(M, 4)}, c)
    assert torch.equal(after["P.A"], state["P.A"]) and not torch.equal(after["P.B"], state["P.B"])


@pytest.mark.parametrize(
    ("term", "rho", "tau"),
    [
        (L1(0.5), 0.1, 0.05),
        (L1(0.5, rho=0.4), 0.2, 0.1),  # its own rate on the schedule, pace 1/2
        (L1(0.5, rho=0.4, eta=0.2), 0.2, 0.05),
        (L1(0.5, eta=2.0), 0.1, 0.5),
        (L1(0.5, threshold="plain"), 0.1, 0.5),
        (L1(0.5, ramp=(2.5, 40)), 0.1, 0.1),  # a quarter of the way from 0.5 to 2.5
    ],
)
def test_rate_threshold_and_ramp_are_what_the_arguments_say(one, term, rho, tau):
    _, state, gradient, c = one
    c = replace(c, round=2, step=5, steps=5, pace=0.5)
    _, after = stepped(term, state, gradient, c)
    expected = soft_threshold(state["P.v"] - rho * gradient["P.v"], tau)
    assert torch.allclose(after["P.v"], expected, rtol=1e-12)


@pytest.mark.parametrize("metric", ("euclidean", "adam"))
def test_the_adam_step_follows_adam_and_thresholds_in_its_metric(one, metric):
    """Against torch's Adam: its step, then |v_i| lowered by η λ, or by η λ / (sqrt(û_i) + ε) read from its state."""
    _, state, _, c = one
    term, lam = L1(0.02, step="adam", metric=metric), 0.02
    v = nn.Parameter(state["P.v"].clone())
    optimiser = torch.optim.Adam([v], lr=c.lr)
    for step in range(1, 6):
        g = draw(4, seed=10 + step)
        v.grad = g.clone()
        optimiser.step()
        scale = (optimiser.state[v]["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8
        with torch.no_grad():
            v.copy_(soft_threshold(v.detach(), c.lr * lam / (scale if metric == "adam" else 1.0)))
        _, state = stepped(term, state, {"P.v": g}, c)
        assert torch.allclose(state["P.v"], v, rtol=1e-9)


def test_the_metric_step_minimises_adams_own_model(one):
    """ĝᵀz + (1/2ρ) Σ d_i (z_i - v_i)² + λ ||z||_1: no perturbation lowers it; the Euclidean threshold ends above it."""
    _, state, gradient, c = one
    v, g, lam = state["P.v"], gradient["P.v"], 0.8
    d = g.abs() + 1e-8  # sqrt(û) after one step

    def model(z):
        return (g * z).sum() + (d * (z - v) ** 2).sum() / (2 * c.lr) + lam * z.abs().sum()

    ends = [stepped(L1(lam, step="adam", metric=m), state, gradient, c)[1]["P.v"] for m in ("adam", "euclidean")]
    moves = [10.0 ** -(k % 6) * draw(4, seed=k) for k in range(200)]
    assert all(model(ends[0] + move) >= model(ends[0]) for move in moves)
    assert model(ends[1]) > model(ends[0]) + 1e-3


def test_gauss_seidel_takes_the_gradient_after_the_other_factors_have_moved(one):
    _, state, gradient, c = one
    fresh = {name: draw(*value.shape, seed=7) for name, value in state.items()}
    term = L1(0.1, order="gauss_seidel")
    _, after = stepped(term, state, gradient, replace(c, again=lambda: fresh))
    assert torch.equal(after["P.v"], stepped(L1(0.1), state, fresh, c)[1]["P.v"])
    assert not term.grouped and L1().grouped


def test_the_orders_agree_where_nothing_else_moves_and_differ_where_it_does(adapted, fit):
    model = adapted(Diagonal, torch.float64, noise=0.1, rank=2, start="gate")
    only_v = Schedule("v", lambda key, round, step, steps: key.factor == "v")
    for schedule, same in ((only_v, True), (together, False)):
        ends = [fit(model, L1(1e-3, order=o), schedule=schedule, steps=3)[0] for o in ("simultaneous", "gauss_seidel")]
        assert all(torch.allclose(ends[0][n], ends[1][n], rtol=1e-9) for n in ends[0] if n.endswith("v")) == same


def test_frozen_at_one_it_leaves_lora_to_the_bit(adapted, fit):
    """λ = 0, v = 1 standing still: A and B are those of LoRA."""
    ends = []
    for wrap, terms, options in ((LoRA, (), {"alpha": 3.0}), (Diagonal, (L1(0.0),), {"alpha": 3.0})):
        still = Schedule("no v", lambda key, round, step, steps: key.factor != "v")
        [end] = fit(adapted(wrap, rank=3, **options), *terms, schedule=still)
        ends.append(end)
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert all((value == 1).all() for name, value in ends[1].items() if name.endswith(".v"))


def test_sora_also_adds_the_mean_gate_to_the_loss(one):
    _, state, _, c = one
    assert L1.sora(weight=10.0).penalty(state, c).item() == pytest.approx(10 * state["P.v"].abs().mean().item())
    assert L1().penalty(state, c) == 0
    two = state | {"Q.v": draw(2, seed=5)}
    both = replace(c, keys=c.keys | {"Q.v": Key("Q", "v", "encoder", "linear")})
    expected = (state["P.v"].abs().sum() + two["Q.v"].abs().sum()) / 6
    assert L1(weight=1.0).penalty(two, both).item() == pytest.approx(expected.item())


def test_the_gauge_moves_norms_into_v_and_leaves_w(one):
    _, state, gradient, c = one
    _, plain = stepped(L1(0.1), state, gradient, c)
    _, fixed = stepped(L1(0.1, gauge="unit"), state, gradient, c)
    assert torch.allclose(fixed["P.A"].norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(fixed["P.B"].norm(dim=0), torch.ones(4, dtype=torch.float64))
    assert (product(fixed) - product(plain)).norm() < 1e-12 * product(plain).norm()


def test_the_gauge_keeps_w_in_single_precision_too(one):
    _, state, gradient, c = one
    state, gradient = ({n: t.float() for n, t in part.items()} for part in (state, gradient))
    ends = [stepped(L1(0.1, gauge=gauge), state, gradient, c)[1] for gauge in (None, "unit")]
    assert (product(ends[1]) - product(ends[0])).norm() < 1e-6 * product(ends[0]).norm()


def test_the_gauge_refuses_a_dead_start(one):
    _, state, gradient, c = one
    with pytest.raises(FedloraError, match="start 'unit'"):
        stepped(L1(0.1, gauge="unit"), state | {"P.B": torch.zeros(M, 4, dtype=torch.float64)}, gradient, c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "gauss-seidel"}, "Did you mean 'gauss_seidel'"),
        ({"metric": "adam"}, "step 'adam'"),
        ({"threshold": "plain", "eta": 0.1}, "no eta"),
        ({"gauge": "unit", "factor": "A"}, "scales v"),
        ({"lam": -1.0}, "negative"),
    ],
)
def test_choices_that_do_not_exist_or_do_not_fit_are_refused(options, message):
    with pytest.raises(FedloraError, match=message):
        L1(**options)


def test_a_model_without_v_is_named(adapted, fit):
    with pytest.raises(FedloraError, match="needs factors v; factors here: A, B"):
        fit(adapted(LoRA), L1())


# ---------------------------------------------------------------- a regression whose rank is known


def known_matrix(values=(2.0, 1.5, 1.0)):
    U, V = torch.linalg.qr(draw(M, M))[0], torch.linalg.qr(draw(N, N, seed=1))[0]
    return U[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ V[:, : len(values)].T


def regress(adapter, *terms, steps, lr=0.1, at=()):
    """½ ||B diag(v) A - W||² from `adapter`'s start (regression on whitened inputs): states at steps `at`, and last."""
    W, kept = known_matrix(), []
    state = {f"P.{name}": value.requires_grad_() for name, value in trainable(adapter).items()}
    optimiser = torch.optim.SGD(list(state.values()), lr=lr)
    c = replace(context(adapter), lr=lr, steps=steps)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        (0.5 * (product(state) - W).square().sum() + sum(term.penalty(state, c) for term in terms)).backward()
        with torch.no_grad():
            gradient = {name: p.grad for name, p in state.items()}
            for term in terms:
                c = replace(c, moves=frozenset(gradient))
                term.gradient_(gradient, state, c)
            for name, p in state.items():
                p.grad = gradient.get(name)
            optimiser.step()
            for term in terms:
                term.prox_(state, c)
        if step in at or step == steps:
            kept.append({name: p.detach().clone() for name, p in state.items()})
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "terms",
    [lambda lam: (L1(lam, gauge="unit"),), lambda lam: (L1(lam), WeightDecay(0.1))],
    ids=["gauge", "decay"],
)
def test_the_rank_falls_with_lambda_and_is_the_true_one_over_a_decade(terms):
    ranks = []
    for lam in (0.0, 1e-2, 1e-1, 3e-1, 3.0):
        [end] = regress(layer(rank=6, seed=1, v=1.0), *terms(lam), steps=800, lr=0.2)
        ranks.append(int((end["P.v"] != 0).sum()))
    assert ranks == sorted(ranks, reverse=True)
    assert ranks == [6, 3, 3, 3, 0]


def size(state):
    """||v||_1, ||W||_F, ||W||_*, the loss."""
    W = product(state)
    loss = 0.5 * (W - known_matrix()).square().sum()
    return [x.item() for x in (state["P.v"].abs().sum(), W.norm(), torch.linalg.matrix_norm(W, "nuc"), loss)]


@pytest.mark.slow
def test_without_gauge_and_decay_the_penalty_falls_by_rescaling_alone():
    """Claim A3: ||v||_1 falls, W and the loss stay. A gauge holds it at ||W||_* or above; decay of A and B stops it."""
    start = {"start": "gate", "rank": 3}
    early, late = (size(s) for s in regress(layer(**start), L1(1e-2), steps=1500, at=(300,)))
    assert late[0] < 0.8 * early[0] and late[0] < late[2]
    assert late[1] == pytest.approx(early[1], rel=1e-3) and max(early[3], late[3]) < 1e-4
    [held] = (size(s) for s in regress(layer(rank=3, v=1.0), L1(1e-2, gauge="unit"), steps=600))
    assert held[0] > (1 - 1e-12) * held[2] and held[3] < 1e-3
    early, late = (size(s) for s in regress(layer(**start), L1(1e-2), WeightDecay(1e-2), steps=1500, at=(300,)))
    assert late[0] > 0.99 * early[0] and late[3] < 1e-3


# ---------------------------------------------------------------- group lasso


@pytest.mark.parametrize("groups", ("directions", "A", "B"))
def test_group_lasso_thresholds_each_direction_as_a_block(one, groups):
    _, state, gradient, c = one
    lam = {"directions": 40.0, "A": 30.0, "B": 27.0}[groups]
    _, after = stepped(GroupLasso(lam, groups), state, gradient, c)
    cut = 0
    for i in range(4):
        parts = {"A": state["P.A"][i], "B": state["P.B"][:, i]}
        ends = {"A": after["P.A"][i], "B": after["P.B"][:, i]}
        members = parts if groups == "directions" else [groups]
        norm = math.sqrt(sum(float(parts[role].square().sum()) for role in members))
        for role in parts:
            factor = max(1 - c.lr * lam / norm, 0) if role in members else 1.0
            assert torch.allclose(ends[role], factor * parts[role], rtol=1e-12)
            assert factor > 0 or not ends[role].any()
        cut += norm <= c.lr * lam
    assert 0 < cut < 4 and torch.equal(after["P.v"], state["P.v"])


def test_group_lasso_finds_the_rank_and_cuts_the_rest_exactly():
    adapter = LoRA(nn.Linear(N, M).double(), 6, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(adapter.B, generator=torch.Generator().manual_seed(1))
    state = {f"P.{name}": value.requires_grad_() for name, value in trainable(adapter).items() if name in "AB"}
    c, W, term = context(adapter), known_matrix(), GroupLasso(0.2)
    for _ in range(600):
        loss = 0.5 * (state["P.B"] @ state["P.A"] - W).square().sum()
        gradient = dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))
        with torch.no_grad():
            c = replace(c, moves=frozenset(gradient))
            term.gradient_(gradient, state, c)
            for name, p in state.items():
                p -= c.lr * gradient[name]
            term.prox_(state, c)
    alive = (state["P.A"] != 0).any(1)
    assert alive.sum() == 3 and torch.equal(alive, (state["P.B"] != 0).any(0))
    assert loss < 0.05


def test_a_pair_of_which_one_part_stands_still_is_refused(one):
    _, state, gradient, c = one
    with pytest.raises(FedloraError, match=r"holds P\.A still"):
        stepped(GroupLasso(), state, {"P.B": gradient["P.B"]}, c)
    _, after = stepped(GroupLasso(), state, {"P.v": gradient["P.v"]}, c)  # none of it moves: fine
    assert all(torch.equal(after[name], state[name]) for name in state)
    with pytest.raises(FedloraError, match="accepted: A, B, directions"):
        GroupLasso(groups="rows")
