"""DoRA and EDoRA: norms without forming W, against the dense formula row by row; EDoRA's factors against numpy."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import adapters, inject, trainable
from fedlora_mini.adapters.base import delta_of, freeze
from fedlora_mini.adapters.dora import DoRA, EDoRA
from fedlora_mini.adapters.io import TENSORS, load, save
from fedlora_mini.adapters.ops import matrix_shape, to_matrix, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, stack

LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (4, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 4, 3, 3)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 4, 3, 3)),
}
KINDS = {
    "dora": lambda layer, g: DoRA(layer, 3, 5.0, generator=g),
    "dora, through the norm": lambda layer, g: DoRA(layer, 3, detach=False, generator=g),
    "edora": lambda layer, g: EDoRA(layer, 3, 2.0, generator=g),
    "edora, through the norm": lambda layer, g: EDoRA(layer, 3, detach=False, generator=g),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def on(layer, kind="dora"):
    make, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    base = make().double()
    for p in base.parameters():
        p.data = torch.randn(p.shape, generator=g).double()
    return KINDS[kind](base, g), torch.randn(shape, generator=g).double()


def dense(module, x, factors, constant=False):
    """W_i = g_i (W_0 + s B A)_i / ||(W_0 + s B A)_i|| formed in full, row by row, then the layer's own operation."""
    leaves = {"A": getattr(module, "A", None), "B": getattr(module, "B", None)} | factors
    middle = leaves["B"] @ factors["R"] if "R" in factors else leaves["B"]
    W = to_matrix(module.base, module.base.weight) + module.scaling * middle @ leaves["A"]
    rows = []
    for i, row in enumerate(W):
        norm = (row * row).sum().sqrt()
        rows.append(factors["g"][i] * row / (norm.detach() if constant else norm))
    weight = to_weight(module.base, torch.stack(rows))
    bias = {} if module.base.bias is None else {"bias": module.base.bias}
    return functional_call(module.base, {"weight": weight} | bias, (x,))


@every_kind
@every_layer
def test_promises(layer, kind, oracle):
    oracle.every_promise(*on(layer, kind))


@every_kind
@every_layer
def test_output_and_gradient_are_those_of_the_dense_formula(layer, kind, oracle):
    """The gradient with the norm a constant where `detach`, and through the norm where not."""
    module, x = on(layer, kind)
    oracle.randomise(module)
    leaves = {name: value.requires_grad_() for name, value in clone(trainable(module)).items()}
    expected = dense(module, x, leaves, constant=module.detach)
    assert oracle.close(module(x), expected)
    found = torch.autograd.grad(module(x).tanh().sum(), [getattr(module, name) for name in leaves])
    by_hand = torch.autograd.grad(expected.tanh().sum(), list(leaves.values()))
    for name, a, b in zip(leaves, found, by_hand, strict=True):
        assert oracle.close(a, b), name
    other = torch.autograd.grad(dense(module, x, leaves, not module.detach).tanh().sum(), list(leaves.values()))
    assert not all(oracle.close(a, b, 1e-3) for a, b in zip(other, by_hand, strict=True))


@every_kind
@every_layer
def test_row_norms_without_forming_the_product(layer, kind, oracle):
    module, _ = on(layer, kind)
    oracle.randomise(module)
    P, Q = module.pair()
    W = to_matrix(module.base, module.base.weight) + P @ Q
    expected = torch.stack([sum(entry**2 for entry in row) ** 0.5 for row in W.detach()])
    assert oracle.close(module.row_norms(P, Q), expected)


@every_kind
@every_layer
def test_the_rows_of_the_folded_weight_have_norm_g(layer, kind, oracle):
    module, _ = on(layer, kind)
    oracle.randomise(module)
    rows = to_matrix(module.base, module.folded()["weight"])
    assert rows.shape[0] == len(module.g) == matrix_shape(module.base)[0]
    assert oracle.close(rows.norm(dim=1), module.g.abs())


@every_layer
def test_one_magnitude_scales_one_output(layer, oracle):
    """g_i times 3 makes channel i three times as large without its bias, and leaves the others alone."""
    module, x = on(layer)
    oracle.randomise(module)
    axis = x.dim() - 1 if isinstance(module.base, nn.Linear) else 1
    before = module(x).detach()
    bias = torch.zeros(before.shape[axis]).double() if module.base.bias is None else module.base.bias
    for i in (0, before.shape[axis] - 1):
        module.g.data[i] *= 3
        after = module(x).detach()
        module.g.data[i] /= 3
        for c in range(before.shape[axis]):
            own = before.select(axis, c) - bias[c]
            assert oracle.close(after.select(axis, c) - bias[c], 3 * own if c == i else own, 1e-9), (i, c)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kind", [DoRA, EDoRA])
def test_a_row_of_zeros_has_no_direction(kind, detach):
    """It gives its bias alone whatever its magnitude says, and no gradient is NaN; the other rows are as before."""
    whole, pruned = nn.Linear(5, 4), nn.Linear(5, 4)
    pruned.load_state_dict(whole.state_dict())
    pruned.weight.data[2] = 0
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    module = kind(pruned, 2, detach=detach, generator=torch.Generator().manual_seed(1))
    if module.starts_at_base:
        assert torch.equal(module(x), pruned(x))
    module.g.data[2] = 1e3  # as noise on the update would leave it
    if kind is EDoRA:
        module.B[2] = 0  # exactly, which an SVD leaves at 1e-9
    y = module(x)
    assert torch.equal(y[:, 2], pruned.bias[2].expand(3))
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)
    others = torch.tensor([0, 1, 3])
    assert torch.allclose(y[:, others], whole(x)[:, others], atol=1e-3)


@every_kind
@pytest.mark.parametrize("layer", ["tokens", "grouped", "transposed, grouped"])
def test_delta_with_a_group_axis(layer, kind, oracle):
    module, _ = on(layer, kind)
    states = [clone(trainable(oracle.randomise(module, seed))) for seed in range(3)]
    stacked = delta_of(module, stack(states))
    for g, state in enumerate(states):
        assert oracle.close(stacked[g], delta_of(module, state))
    for name in states[0]:
        mixed = delta_of(module, states[0] | {name: stack(states)[name]})
        assert oracle.close(mixed[2], delta_of(module, states[0] | {name: states[2][name]}))


def test_counts():
    layer = nn.Linear(20, 12)
    assert sum(v.numel() for v in trainable(DoRA(layer, 3)).values()) == 3 * (20 + 12) + 12
    assert sum(v.numel() for v in trainable(EDoRA(layer, 3)).values()) == 3**2 + 12


@pytest.mark.parametrize("name", ["minisam", "unet"])
@pytest.mark.parametrize("kind", KINDS)
def test_inside_networks(name, kind, oracle, tmp_path):
    options = dict(d=16, depth=1, stem=8, width=8) if name == "minisam" else dict(features=(4, 8, 8))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    oracle.in_a_network(zoo.build(name, 2, **options), KINDS[kind], layers, x, tmp_path)


def test_refusals():
    for wrap in (DoRA, EDoRA):
        with pytest.raises(FedloraError, match="rank must be at least 1, got 0"):
            wrap(nn.Linear(4, 6), 0)
        with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
            wrap(nn.Embedding(4, 6))


# ---------------------------------------------------------------- EDoRA's frozen factors


@every_layer
@pytest.mark.parametrize("rank", [2, 50])
def test_the_frozen_factors_are_the_truncated_svd(layer, rank, oracle):
    base = LAYERS[layer][0]().double()
    module = EDoRA(base, rank)
    W = to_matrix(base, base.weight).detach()
    assert module.rank == min(rank, *matrix_shape(base))
    U, sigma, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    best = torch.from_numpy(U[:, : module.rank] * sigma[: module.rank] @ Vh[: module.rank])
    assert oracle.close(module.B @ module.A, best)
    assert oracle.close(module.A @ module.A.T, torch.eye(module.rank).double())  # Σ stands in B
    assert module.R.abs().max() < 1e-4 and oracle.close(module.g, W.norm(dim=1))


def test_the_frozen_factors_do_not_train_and_are_saved_with_the_adapter(tmp_path):
    def build():
        return zoo.build("minisam", 2, d=16, depth=1, stem=8, width=8)

    def wrap(layer, g):
        return EDoRA(layer, 2, generator=g)

    model = inject(freeze(build()), wrap, layers)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for _, adapter in adapters(model):  # singular vectors of the other sign, as another machine may have them
        adapter.A.neg_()
        adapter.B.neg_()
        nn.init.normal_(adapter.R, generator=torch.Generator().manual_seed(1))
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"R", "g"}
    model(x).sum().backward()
    assert all(adapter.A.grad is None and not adapter.A.requires_grad for _, adapter in adapters(model))
    stored = load_file(save(model, tmp_path) / TENSORS)
    assert all(torch.equal(stored[f"{path}.A"], adapter.A) for path, adapter in adapters(model))
    loaded = load(build(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    signs = [torch.equal(a.A, b.A) for (_, a), (_, b) in zip(adapters(loaded), adapters(model), strict=True)]
    assert signs and all(signs)
