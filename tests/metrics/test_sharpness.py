"""Curvature without a matrix, against the matrix; on every network of the zoo against differences of gradients."""

import math

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import LoRA, call, prepare, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.metrics.sharpness import (
    balanced,
    curvature,
    direction,
    hvp,
    lambda_max,
    lanczos,
    landscape,
    power_iteration,
)
from fedlora_mini.models import build, zoo


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def square_loss(out, y):
    return (out.tanh() - y).square().sum(1)


def small(seed=0, start=False):
    """Two adapted layers with a kink-free bend between them, 12 rows of data."""
    torch.set_num_threads(1)
    layers = [LoRA(nn.Linear(*sizes).double(), 2, alpha=3.0, generator=rng(seed)) for sizes in ((5, 4), (4, 3))]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1])
    state = trainable(model)
    if not start:
        state = {n: 0.7 * draw(*v.shape, seed=seed + k) for k, (n, v) in enumerate(state.items())}
    return model, state, draw(12, 5, seed=50), draw(12, 3, seed=51)


def dense(model, state, x, y, names=None):
    """The Hessian, formed: (d, d)."""
    names = list(names or state)
    sizes = [state[n].numel() for n in names]

    def L(flat):
        own = {n: f.view(state[n].shape) for n, f in zip(names, flat.split(sizes), strict=True)}
        return square_loss(call(model, {**state, **own}, x), y).mean()

    return torch.func.hessian(L)(torch.cat([state[n].flatten() for n in names]))


@pytest.mark.parametrize("micro", [1, 5, 64])
def test_the_product_is_that_of_the_formed_hessian(micro):
    model, state, x, y = small()
    product, size = curvature(model, state, square_loss, x, y, micro=micro)
    H = dense(model, state, x, y)
    assert H.shape == (size, size)
    v = draw(size, seed=9)
    assert torch.allclose(product(v), H @ v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", ["all", "A", "B"])
def test_lambda_max_is_the_largest_eigenvalue_of_the_formed_hessian(seed, factor):
    model, state, x, y = small(seed)
    names = [n for n in state if factor == "all" or n.endswith(factor)]
    eigenvalues = torch.linalg.eigvalsh(dense(model, state, x, y, names))
    found = lambda_max(model, state, square_loss, x, y, rng(), None if factor == "all" else names, tolerance=1e-6)
    assert found.value == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert found.value <= float(eigenvalues[-1]) * (1 + 1e-12) and found.products <= len(eigenvalues)
    whole = lambda_max(model, state, square_loss, x, y, rng(), names, most=1000, tolerance=0.0)
    assert whole.lowest == pytest.approx(float(eigenvalues[0]), abs=1e-8)


def test_the_residual_bounds_the_error():
    H = draw(40, 40)
    H = H + H.T
    eigenvalues = torch.linalg.eigvalsh(H)
    for most in (2, 5, 10, 20):
        found = lanczos(lambda v: H @ v, draw(40, seed=3), most, 0.0)
        assert found.products == most
        assert float((eigenvalues - found.value).abs().min()) <= found.residual + 1e-10
        assert found.value <= float(eigenvalues[-1]) + 1e-10


def test_degenerate_spectra():
    eye = lanczos(lambda v: 3 * v, draw(10))
    assert (eye.value, eye.lowest, eye.products) == (pytest.approx(3), pytest.approx(3), 1)
    zero = lanczos(lambda v: 0 * v, draw(10))
    assert zero.value == 0 == zero.residual
    one = lanczos(lambda v: -2 * v, draw(1))
    assert one.value == pytest.approx(-2)


def test_at_lora_s_start_power_iteration_goes_astray_and_lanczos_does_not():
    """(b a - 1)²/2 at b = a = 0 has eigenvalues 1 and -1: neither of them is the one of largest modulus."""
    H = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([1.0, 0.2], dtype=torch.float64)
    values = power_iteration(lambda v: H @ v, start, 100)
    assert max(values) - min(values) < 1e-12 and abs(values[-1]) < 0.5
    assert lanczos(lambda v: H @ v, start).value == pytest.approx(1)
    P = draw(8, 8)
    P = P @ P.T  # positive: there both agree
    top = float(torch.linalg.eigvalsh(P)[-1])
    assert power_iteration(lambda v: P @ v, draw(8, seed=1), 500)[-1] == pytest.approx(top, rel=1e-6)
    model, state, x, y = small(start=True)
    spectrum = torch.linalg.eigvalsh(dense(model, state, x, y))
    found = lambda_max(model, state, square_loss, x, y, rng(), tolerance=1e-8)
    assert spectrum[0] < 0 and found.value == pytest.approx(float(spectrum[-1]), rel=1e-6)


def test_a_linear_loss_has_no_curvature():
    model = LoRA(nn.Linear(3, 2).double(), 2)
    state = trainable(model) | {"B": draw(2, 2)}
    x, y = draw(4, 3), draw(4, 2)
    v = {"B": draw(2, 2, seed=1)}  # A stays: then the output is linear in what moves
    assert not hvp(model, state, lambda out, y: out.sum(1), x, y, v)["B"].any()


def test_errors_name_the_cause():
    model, state, x, y = small()
    with pytest.raises(FedloraError, match="no image"):
        hvp(model, state, square_loss, x[:0], y[:0], state)
    with pytest.raises(FedloraError, match="none of"):
        lambda_max(model, state, square_loss, x, y, rng(), moves=["nothing"])
    broken = {n: v * math.nan for n, v in state.items()}
    with pytest.raises(FedloraError, match="not finite"):
        lambda_max(model, broken, square_loss, x, y, rng())


# ---------------------------------------------------------------- the zoo

SLOW = {"unet3d", "attention_unet3d", "unetr3d", "swin_unetr3d", "segresnet3d"}  # their 2D twins are not
NETWORKS = [name if name == "minisam" else pytest.param(name, marks=pytest.mark.slow) for name in zoo.MODELS]


BENT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardswish)


def smooth(model):
    """The network with SiLU in the place of bent activations: differences would count their kinks, ∇² does not."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BENT):
                setattr(module, name, nn.SiLU())
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_on_every_network_it_is_the_difference_of_gradients(name, monkeypatch):
    """H v ≈ (∇L(θ + h v) - ∇L(θ - h v)) / 2h, image by image.

    SwinUNETR is the trap: its windows leave tensors in channels-last order before instance norms, whose second
    derivative for a single image PyTorch 2.13 then gets wrong by a tenth of its length, without a word.
    """
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.nn.functional, "relu6", torch.nn.functional.silu)
    model = prepare(smooth(build(name, classes=2)), "lora", 0, rank=2).double()
    state = {n: v + 0.05 * draw(*v.shape, seed=k) for k, (n, v) in enumerate(trainable(model).items())}
    entry = zoo.MODELS[name]
    size = 64 if name == "unetr" else entry.smallest
    x = torch.rand(1 if name in SLOW else 2, 3, *(size,) * entry.dims, generator=rng(), dtype=torch.float64)
    y = (x[:, 0] > 0.5).long()
    v = {n: draw(*value.shape, seed=100 + k) for k, (n, value) in enumerate(state.items())}
    h = 1e-5

    def gradient(sign):
        leaves = {n: (state[n] + sign * h * v[n]).requires_grad_() for n in state}
        value = segmentation_loss(call(model, leaves, x), y).mean()
        return torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)

    found = hvp(model, state, segmentation_loss, x, y, v, micro=1)
    expected = [(up - down) / (2 * h) for up, down in zip(gradient(1), gradient(-1), strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in zip(found.values(), expected, strict=True)) ** 0.5
    length = sum(float(b.square().sum()) for b in expected) ** 0.5
    assert error < 1e-4 * length and length > 0


# ---------------------------------------------------------------- gauge, slices


def test_sharpness_depends_on_how_the_product_is_split_and_balanced_does_not():
    model, state, x, y = small()
    lopsided = {n: v * (5.0 if n.endswith("A") else 0.2) for n, v in state.items()}
    assert torch.allclose(call(model, state, x), call(model, lopsided, x))

    def sharp(s):
        return lambda_max(model, s, square_loss, x, y, rng(), tolerance=1e-8).value

    assert sharp(lopsided) > 2 * sharp(state)
    fair = [balanced(s) for s in (state, lopsided)]
    assert all(torch.allclose(call(model, s, x), call(model, state, x)) for s in fair)
    assert sharp(fair[0]) == pytest.approx(sharp(fair[1]), rel=1e-6)
    for path in ("0", "2"):
        b, a = (fair[0][f"{path}.{factor}"] for factor in "BA")
        assert torch.allclose(b.T @ b, a @ a.T)


def test_balanced_where_the_layer_is_thinner_than_the_rank():
    state = {"l.B": draw(2, 4), "l.A": draw(4, 7, seed=1), "head.D": draw(2, 2)}
    out = balanced(state)
    assert torch.allclose(out["l.B"] @ out["l.A"], state["l.B"] @ state["l.A"])
    assert out["l.B"].shape == (2, 4) and out["head.D"] is state["head.D"]


def test_a_direction_has_the_lengths_of_the_state_s_filters():
    state = {"l.B": draw(6, 3), "l.A": draw(3, 8, seed=1), "head.D": draw(2, 4, seed=2), "head.d": draw(2, seed=3)}
    d = direction(state, rng())
    assert torch.allclose(d["l.B"].norm(dim=0), state["l.B"].norm(dim=0))
    assert torch.allclose(d["l.A"].norm(dim=1), state["l.A"].norm(dim=1))
    assert torch.allclose(d["head.D"].norm(dim=1), state["head.D"].norm(dim=1))
    assert torch.allclose(d["head.d"].norm(), state["head.d"].norm())
    assert all(torch.equal(d[n], direction(dict(reversed(state.items())), rng())[n]) for n in state)
    assert not direction({"l.B": torch.zeros(3, 2)}, rng())["l.B"].any()


def test_a_slice_is_the_loss_along_it_and_bends_as_the_product_says():
    model, state, x, y = small()
    d = direction(state, rng())
    h = 1e-3
    values = landscape(model, state, square_loss, x, y, [d], [-h, 0.0, h], micro=5)
    assert values[1] == pytest.approx(float(square_loss(call(model, state, x), y).mean()))
    bend = float(values[0] - 2 * values[1] + values[2]) / h**2
    Hd = hvp(model, state, square_loss, x, y, d)
    assert bend == pytest.approx(sum(float((Hd[n] * d[n]).sum()) for n in d), rel=1e-4)
    plane = landscape(model, state, square_loss, x, y, [d, direction(state, rng(1))], [-h, 0.0, h])
    assert plane.shape == (3, 3) and torch.allclose(plane[:, 1], values)
