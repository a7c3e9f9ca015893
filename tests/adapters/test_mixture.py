"""Mo-SARA: against a loop over images and experts with dense weights; with one expert it is Diagonal."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import adapters, call, inject, merge, trainable, unload
from fedlora_mini.adapters.base import freeze
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.mixture import MixtureSARA
from fedlora_mini.adapters.ops import matrix_shape, to_matrix, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import count

LAYERS = {  # how to make it, a batch, the axes that the router takes the mean over
    "rows": (lambda: nn.Linear(5, 6), (4, 5), ()),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5), (1,)),
    "map": (lambda: nn.Linear(5, 6), (4, 3, 2, 5), (1, 2)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7), (2,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6), (2, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (4, 4, 5, 5), (2, 3)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3), (2, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4), (2, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 3, 3), (2, 3)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def on(layer, rank=3, experts=3):
    make, shape, _ = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return MixtureSARA(make().double(), rank, experts, generator=g), torch.randn(shape, generator=g).double()


@every_layer
def test_promises(layer, oracle):
    oracle.every_promise(*on(layer))


@every_layer
def test_the_definition_image_by_image_and_expert_by_expert(layer, oracle):
    """y_i = W_0 x_i + Σ_j ω_j(x_i) (B diag(v_j) A) x_i + b, with every weight formed and the softmax written out."""
    module, x = on(layer)
    oracle.randomise(module)
    base, axes = module.base, LAYERS[layer][2]
    for i in range(len(x)):
        mean = x[i : i + 1].mean(axes)[0] if axes else x[i]  # (c,)
        scores = [math.exp((module.router[j] @ mean).item()) for j in range(3)]
        expected = base(x[i : i + 1])
        for j, score in enumerate(scores):
            W = sum(module.v[j, d] * torch.outer(module.B[:, d], module.A[d]) for d in range(3))
            no_bias = {} if base.bias is None else {"bias": torch.zeros_like(base.bias)}
            own = functional_call(base, {"weight": to_weight(base, W)} | no_bias, (x[i : i + 1],))
            expected = expected + score / sum(scores) * own
        assert oracle.close(module(x)[i : i + 1], expected), i


@every_layer
def test_one_expert_is_diagonal_with_the_singular_vectors(layer, oracle):
    module, x = on(layer, experts=1)
    oracle.randomise(module)
    diagonal = Diagonal(module.base, 3)
    with torch.no_grad():
        diagonal.A.copy_(module.A)
        diagonal.B.copy_(module.B)
        diagonal.v.copy_(module.v[0])
    assert oracle.close(module(x), diagonal(x))


@every_layer
def test_equal_experts_leave_nothing_to_route(layer, oracle):
    module, x = on(layer)
    oracle.randomise(module)
    module.v.data[:] = module.v.data[:1]
    before = module(x)
    module.router.data.neg_()
    assert oracle.close(module(x), before)


@every_layer
@pytest.mark.parametrize("rank", [2, 50])
def test_the_frozen_factors_are_the_leading_singular_vectors(layer, rank, oracle):
    module, _ = on(layer, rank)
    W = to_matrix(module.base, module.base.weight).detach()
    r = min(rank, *matrix_shape(module.base))
    U, sigma, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    assert module.A.shape == (r, W.shape[1]) and module.B.shape == (W.shape[0], r)
    assert oracle.close(
        (module.B * torch.from_numpy(sigma[:r])) @ module.A, torch.from_numpy(U[:, :r] * sigma[:r] @ Vh[:r])
    )
    for gram in (module.A @ module.A.T, module.B.T @ module.B):
        assert oracle.close(gram, torch.eye(r).double())
    assert set(trainable(module)) == {"v", "router"}


def test_the_experts_part_from_a_common_start():
    """v = 0 is the base to the bit; the router's small numbers give every expert another gradient."""
    module, x = on("tokens")
    assert torch.equal(module(x), module.base(x)) and not module.v.any()
    (gradient,) = torch.autograd.grad(module(x).tanh().sum(), module.v)
    assert gradient.abs().min() > 0
    assert all((gradient[i] - gradient[j]).norm() > 1e-4 * gradient[i].norm() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_window_is_routed_by_its_own_mean(oracle):
    """Rows (images * windows, t, n), as in a Swin block: a window's output does not depend on its neighbours."""
    module = MixtureSARA(nn.Linear(5, 6).double(), 3, 3, generator=torch.Generator().manual_seed(0))
    oracle.randomise(module)
    x = torch.randn(2 * 4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    whole = module(x)
    assert all(oracle.close(module(x[i : i + 1]), whole[i : i + 1]) for i in range(8))
    together = module(x.reshape(2, 12, 5)).reshape(8, 3, 6)  # one mean for the four windows of an image
    assert not any(oracle.close(together[i], whole[i], 1e-3) for i in range(8))


@pytest.mark.parametrize("name", ["minisam", "unet", "swin_unetr"])
def test_inside_networks(name, oracle, tmp_path):
    options = {"minisam": dict(d=16, depth=1, stem=8, width=8), "unet": dict(features=(4, 8, 8))}.get(name, {})
    x = torch.rand(2, 3, *(64 if name == "swin_unetr" else 16,) * 2, generator=torch.Generator().manual_seed(0))

    def make(layer, generator):
        return MixtureSARA(layer, 2, 2, generator)

    def some(path, module):  # of 80 layers
        return layers(path, module) and (name != "swin_unetr" or "layers1" in path or "decoder1" in path)

    oracle.in_a_network(zoo.build(name, 2, **options), make, some, x.double(), tmp_path)


def test_it_stays_beside_the_layer_when_the_others_are_folded(oracle):
    module, x = on("rows")
    with pytest.raises(FedloraError, match="MixtureSARA cannot be merged"):
        module.merge()
    model = inject(freeze(nn.Sequential(nn.Linear(5, 5)).double()), lambda layer, g: MixtureSARA(layer, generator=g))
    oracle.randomise(model)
    expected = model(x)
    assert torch.equal(unload(merge(model))(x), expected) and len(list(adapters(model))) == 1


def test_count():
    assert count(trainable(MixtureSARA(nn.Linear(20, 12), 3, 4))) == 4 * (3 + 20)
    assert count(trainable(MixtureSARA(nn.Conv2d(8, 12, 3, groups=2), 3, 4))) == 4 * (3 + 8)


def test_refusals():
    for rank, experts in ((0, 2), (2, 0)):
        with pytest.raises(FedloraError, match=f"rank and experts must be at least 1, got {rank} and {experts}"):
            MixtureSARA(nn.Linear(4, 6), rank, experts)
    with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
        MixtureSARA(nn.Embedding(4, 6))
    module = MixtureSARA(nn.Linear(4, 6))
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(module, {n: v.expand(3, *v.shape) for n, v in trainable(module).items()}, torch.randn(4, 5, 4))
