"""Nuclear and nuclear-Frobenius terms of W = s B diag(v) A against the same on the dense matrix."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import only
from fedlora_mini.regularizers import Context, NuclearFrobenius, NuclearNorm

M, N, R = 6, 9, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(wrap, alpha=10.0, lr=0.1):
    """(state, context) of one layer with random factors, s = alpha / R."""
    adapter = wrap(nn.Linear(N, M).double(), R, alpha)
    shapes = {"A": (R, N), "v": (R,), "B": (M, R)}
    state = {f"P.{role}": draw(*shapes[role], seed=k) for k, role in enumerate(adapter.factors)}
    keys = {name: Key("P", name[-1], "encoder", "linear") for name in state}
    return state, Context(1, 1, {}, keys, lr, layers={"P": adapter})


def dense(state, context):
    """W itself."""
    v = state.get("P.v", torch.ones(R, dtype=torch.float64))
    return context.layers["P"].scaling * (state["P.B"] * v) @ state["P.A"]


def prox(term, state, context):
    after = {name: value.clone() for name, value in state.items()}
    context = replace(context, moves=frozenset({name: torch.zeros_like(value) for name, value in state.items()}))
    term.gradient_({name: torch.zeros_like(value) for name, value in state.items()}, after, context)
    term.prox_(after, context)
    return after


def smooth_dense(W, term):
    """The smooth forms from a full SVD of W; r of the min(m, n) singular values belong to the product."""
    sigma = torch.linalg.svdvals(W)[:R]
    nuclear = (sigma**2 + term.eps).sqrt().sum()
    if isinstance(term, NuclearNorm):
        return term.lam * nuclear
    square = (W**2).sum()
    return term.lam * (nuclear - term.alpha * (square + term.eps).sqrt() + 0.5 * term.ridge * square)


SMOOTH = [
    NuclearNorm(0.3, "smooth", eps=1e-2),
    NuclearFrobenius(0.3, 1.0, form="smooth", eps=1e-2),
    NuclearFrobenius(0.3, -0.5, 0.7, form="smooth", eps=1e-2),
]
both_adapters = pytest.mark.parametrize("wrap", [LoRA, Diagonal])


@both_adapters
@pytest.mark.parametrize("term", SMOOTH, ids=lambda term: term.label)
def test_the_smooth_forms_are_those_of_the_dense_matrix_value_and_gradient(wrap, term):
    state, c = setting(wrap)
    state = {name: value.requires_grad_() for name, value in state.items()}
    values = [term.penalty(state, c), smooth_dense(dense(state, c), term)]
    gradients = [torch.autograd.grad(value, list(state.values())) for value in values]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    for thin, full in zip(*gradients, strict=True):
        assert torch.allclose(thin, full, rtol=1e-9, atol=1e-12)


@both_adapters
@pytest.mark.parametrize("term", [*SMOOTH, NuclearNorm(0.3, "variational")], ids=lambda term: term.label)
def test_gradients_agree_with_finite_differences(wrap, term):
    state, c = setting(wrap)
    names = list(state)

    def value(*tensors):
        return term.penalty(dict(zip(names, tensors, strict=True)), c)

    assert torch.autograd.gradcheck(value, tuple(state[name].requires_grad_() for name in names))


@both_adapters
def test_equal_and_zero_singular_values_have_finite_exact_gradients(wrap):
    """LoRA's start B = 0, and a W with one singular value three times, where the SVD's backward pass divides by 0."""
    state, c = setting(wrap)
    term = SMOOTH[0]
    start = {name: value.requires_grad_() for name, value in (state | {"P.B": torch.zeros_like(state["P.B"])}).items()}
    for gradient in torch.autograd.grad(term.penalty(start, c), list(start.values())):
        assert not gradient.any()
    Q = torch.linalg.qr(draw(M, R, seed=5))[0]
    P = torch.linalg.qr(draw(N, R, seed=6))[0].T
    equal = {"P.A": P, "P.B": Q, "P.v": torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)}
    if wrap is LoRA:
        equal = {"P.A": P, "P.B": Q * equal["P.v"]}
    B = equal["P.B"].requires_grad_()
    [gradient] = torch.autograd.grad(term.penalty(equal, c), [B])
    s = c.layers["P"].scaling
    left = equal["P.v"] if wrap is Diagonal else 1.0
    expected = 0.3 * s * (s / (s**2 + term.eps) ** 0.5) * (Q * torch.tensor([1.0, 1.0, 1.0, 0.0]).double()) * left
    assert torch.allclose(gradient, expected, atol=1e-12)


@both_adapters
def test_the_variational_form_bounds_the_nuclear_norm_and_is_tight_when_balanced(wrap):
    state, c = setting(wrap)
    nuclear = torch.linalg.matrix_norm(dense(state, c), "nuc")
    assert NuclearNorm(1.0, "variational").penalty(state, c) > nuclear
    balanced = prox(NuclearNorm(0.0), state, c)
    assert NuclearNorm(1.0, "variational").penalty(balanced, c).item() == pytest.approx(nuclear.item(), rel=1e-12)


# ---------------------------------------------------------------- proximal steps


@both_adapters
@pytest.mark.parametrize("lam", (0.0, 5.0, 60.0, 1e4))
def test_the_proximal_step_lowers_the_singular_values_of_w_and_keeps_its_vectors(wrap, lam):
    state, c = setting(wrap)
    U, sigma, Vh = torch.linalg.svd(dense(state, c), full_matrices=False)
    expected = U * (sigma - c.lr * lam).clamp(min=0) @ Vh
    after = prox(NuclearNorm(lam), state, c)
    assert torch.allclose(dense(after, c), expected, atol=1e-10)
    zero = after["P.v"] == 0 if wrap is Diagonal else (after["P.B"] == 0).all(0)
    assert int(zero.sum()) == R - int((sigma[:R] > c.lr * lam).sum())
    assert zero.all() if lam == 1e4 else not zero.all()


@both_adapters
@pytest.mark.parametrize(("alpha", "ridge"), [(1.0, 0.0), (0.4, 0.0), (-0.3, 0.0), (0.5, 0.2)])
@pytest.mark.parametrize("lam", (10.0, 1e4))
def test_the_nuclear_frobenius_step_beats_every_other_matrix(wrap, alpha, ridge, lam):
    """½ ||Z - W||² + lr λ (||Z||_* - α ||Z||_F + ½ ridge ||Z||²) over dense Z: perturbed, truncated, rescaled ones."""
    state, c = setting(wrap)
    W = dense(state, c)
    Z = dense(prox(NuclearFrobenius(lam, alpha, ridge), state, c), c)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)

    def objective(Z):
        norms = torch.linalg.matrix_norm(Z, "nuc") - alpha * Z.norm() + 0.5 * ridge * Z.square().sum()
        return 0.5 * (Z - W).square().sum() + c.lr * lam * norms

    others = [Z + 10.0 ** -(k % 5) * draw(M, N, seed=k) for k in range(100)]
    cut = [U[:, :k] * sigma[:k] @ Vh[:k] for k in range(R + 1)]
    others += [scale * X for scale in (0.2, 0.5, 0.8, 0.95, 1.05, 1.5) for X in (W, Z, *cut)] + cut
    assert all(objective(other) >= objective(Z) - 1e-9 for other in others)


def test_with_alpha_one_the_largest_direction_stays_as_it_is():
    state, c = setting(LoRA)
    U, sigma, Vh = torch.linalg.svd(dense(state, c), full_matrices=False)
    assert torch.allclose(dense(prox(NuclearFrobenius(1e6), state, c), c), sigma[0] * U[:, :1] @ Vh[:1], atol=1e-10)
    assert not dense(prox(NuclearFrobenius(1e6, alpha=-1.0), state, c), c).any()


def test_the_factors_of_lora_come_out_balanced_and_near_where_they_were():
    state, c = setting(LoRA)
    after = prox(NuclearNorm(0.0), state, c)
    A, B = after["P.A"], after["P.B"]
    assert torch.allclose(B.T @ B, A @ A.T, atol=1e-12)
    again = prox(NuclearNorm(0.0), after, c)  # balanced ones do not move
    assert all(torch.allclose(again[name], after[name], atol=1e-12) for name in after)
    moved = prox(NuclearNorm(1e-4), after, c)  # and a small step moves them little, no column changes its place or sign
    assert all((moved[name] - after[name]).norm() < 1e-4 * after[name].norm() for name in after)
    _, removed, _ = torch.linalg.svd(dense(after, c), full_matrices=False)
    fewer = prox(NuclearNorm(0.5 * float(removed[R - 2] + removed[R - 1]) / c.lr), after, c)
    dead = (fewer["P.B"] == 0).all(0)
    assert dead.sum() == 1 and torch.equal(fewer["P.A"][dead], after["P.A"][dead])  # it can come back through its a_i


def test_the_factors_of_a_diagonal_come_out_orthonormal_each_in_its_place():
    state, c = setting(Diagonal)
    after = prox(NuclearNorm(0.0), state, c)
    I = torch.eye(R, dtype=torch.float64)
    assert torch.allclose(after["P.A"] @ after["P.A"].T, I) and torch.allclose(after["P.B"].T @ after["P.B"], I)
    sigma = torch.linalg.svdvals(dense(state, c))[:R] / c.layers["P"].scaling
    assert torch.allclose(after["P.v"].abs().sort(descending=True).values, sigma)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {"P.A": -after["P.A"][order], "P.v": -after["P.v"][order], "P.B": after["P.B"][:, order]}
    kept = prox(NuclearNorm(0.0), shuffled, c)  # places and signs stay
    assert all(torch.allclose(kept[name], shuffled[name], atol=1e-12) for name in kept)


@both_adapters
def test_a_layer_that_is_still_at_its_start_is_not_disturbed(wrap):
    state, c = setting(wrap)
    state["P.B"] = torch.zeros_like(state["P.B"])
    after = prox(NuclearNorm(0.1), state, c)
    assert torch.equal(after["P.A"], state["P.A"]) and torch.equal(after["P.B"], state["P.B"])


def test_more_directions_than_the_matrix_has_rank():
    adapter = LoRA(nn.Linear(5, 3).double(), 7)
    state = {"P.A": draw(7, 5), "P.B": draw(3, 7, seed=1)}
    c = Context(1, 1, {}, {name: Key("P", name[-1], "encoder", "linear") for name in state}, 0.1, layers={"P": adapter})
    after = prox(NuclearNorm(0.0), state, c)
    assert torch.allclose(after["P.B"] @ after["P.A"], state["P.B"] @ state["P.A"], atol=1e-12)
    assert int((after["P.B"] != 0).any(0).sum()) == 3


def descend(term, state, c, target, steps):
    """SGD on ½ ||W - target||² with the term's loss and its step."""
    state = {name: value.clone().requires_grad_() for name, value in state.items()}
    for _ in range(steps):
        loss = 0.5 * (dense(state, c) - target).square().sum() + term.penalty(state, c)
        gradient = dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))
        with torch.no_grad():
            c = replace(c, moves=frozenset(gradient))
            term.gradient_(gradient, state, c)
            for name, p in state.items():
                p -= c.lr * gradient[name]
            term.prox_(state, c)
    return torch.linalg.svdvals(dense(state, c).detach())[:R]


def test_what_descent_in_the_factors_converges_to():
    """For ½ ||W - W*||²: forms in the loss lower every σ by λ; the proximal form by λ / (2 s σ), or to zero."""
    _, c = setting(LoRA, alpha=6.0, lr=0.02)
    s, lam, wanted = c.layers["P"].scaling, 0.3, torch.tensor([3.0, 2.0, 1.0, 0.2], dtype=torch.float64)
    U, V = torch.linalg.qr(draw(M, R, seed=8))[0], torch.linalg.qr(draw(N, R, seed=9))[0]
    start = {"P.B": U * (wanted / s).sqrt(), "P.A": ((wanted / s).sqrt() * V).T}  # without the term, already the end
    target = U * wanted @ V.T
    for form in ("smooth", "variational"):
        sigma = descend(NuclearNorm(lam, form, eps=1e-10), start, c, target, 500)
        assert torch.allclose(sigma, (wanted - lam).clamp(min=0), atol=1e-2)
    sigma = descend(NuclearNorm(lam), start, c, target, 500)
    assert torch.allclose((wanted - sigma)[:3], lam / (2 * s * sigma[:3]), rtol=0.03)
    assert sigma[3] < 1e-12


# ---------------------------------------------------------------- in training


def test_a_step_that_holds_a_factor_still_is_refused(adapted, fit):
    with pytest.raises(FedloraError, match=r"holds .* still"):
        fit(adapted(LoRA), NuclearNorm(), schedule=only("B"))
    fit(adapted(LoRA), NuclearNorm(form="smooth"), schedule=only("B"), steps=1)


def test_unknown_forms_are_refused():
    with pytest.raises(FedloraError, match="Did you mean 'proximal'"):
        NuclearNorm(form="proximall")
    with pytest.raises(FedloraError, match="accepted: proximal, smooth"):
        NuclearFrobenius(form="variational")
    with pytest.raises(FedloraError, match="at most 1"):
        NuclearFrobenius(alpha=1.5)
