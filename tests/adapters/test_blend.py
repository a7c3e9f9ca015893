"""Blend: against dense weights, against its two ends, and what each part is trained by."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import Dense, LoRA, call, trainable
from fedlora_mini.adapters.base import delta_of
from fedlora_mini.adapters.blend import Blend
from fedlora_mini.adapters.ops import matrix_shape, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, count, stack

LAYERS = {
    "rows": (lambda: nn.Linear(5, 6), (4, 5)),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (4, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 4, 3, 3)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def on(layer, mu=0.3):
    make, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return Blend(make().double(), 2, mu, 5.0, generator=g), torch.randn(shape, generator=g).double()


@every_layer
def test_promises(layer, oracle):
    oracle.every_promise(*on(layer))


@every_layer
def test_the_definition_with_dense_weights(layer, oracle):
    module, x = on(layer)
    oracle.randomise(module)
    product = sum(torch.outer(module.B[:, i], module.A[i]) for i in range(2))
    W = 0.7 * module.D_own + 0.3 * 5 / 2 * to_weight(module.base, product)
    assert oracle.close(module.delta(), W)
    assert oracle.close(module(x), functional_call(module.base, {"weight": module.base.weight + W}, (x,)))


@every_layer
def test_its_ends_are_lora_and_dense(layer, oracle):
    """And at an end the other part gets no gradient."""
    for mu, silent in ((1.0, "D_own"), (0.0, "B")):
        module, x = on(layer, mu)
        oracle.randomise(module)
        end = LoRA(module.base, 2, 5.0) if mu else Dense(module.base)
        with torch.no_grad():
            for name, value in (("A", module.A), ("B", module.B)) if mu else (("D", module.D_own),):
                getattr(end, name).copy_(value)
        assert oracle.close(module(x), end(x))
        module(x).tanh().sum().backward()
        assert not getattr(module, silent).grad.any()
        assert all(getattr(module, name).grad.any() for name in {"D_own", "B"} - {silent})


def test_the_mean_of_two_networks_at_one_half(oracle):
    """Why one layer stands for pFedLoRA's two: with μ = 1/2 it answers as the mean of the two changed layers."""
    module, x = on("conv2d", 0.5)
    oracle.randomise(module)
    own = call(module, {"B": torch.zeros_like(module.B), "D_own": 2 * module.D_own.detach()}, x)  # μ halves it again
    common = call(module, {"D_own": torch.zeros_like(module.D_own), "B": 2 * module.B.detach()}, x)
    assert oracle.close(module(x), (own + common) / 2)


@pytest.mark.parametrize("layer", ["tokens", "transposed, grouped"])
def test_delta_with_a_group_axis(layer, oracle):
    module, _ = on(layer)
    states = [clone(trainable(oracle.randomise(module, seed))) for seed in range(3)]
    stacked = delta_of(module, stack(states))
    for g, state in enumerate(states):
        assert oracle.close(stacked[g], delta_of(module, state))
    mixed = delta_of(module, states[0] | {"D_own": stack(states)["D_own"]})
    assert oracle.close(mixed[2], delta_of(module, states[0] | {"D_own": states[2]["D_own"]}))


def test_the_start_is_the_base():
    module, x = on("tokens")
    assert torch.equal(module(x), module.base(x))
    assert module.A.any() and not module.B.any() and not module.D_own.any()
    assert Blend(nn.Linear(4, 6)).config() == {"rank": 4, "mu": 0.5, "alpha": 4.0}


@every_layer
def test_count(layer):
    module, _ = on(layer)
    m, n = matrix_shape(module.base)
    assert count(trainable(module)) == m * n + 2 * (m + n)


@pytest.mark.parametrize("name", ["minisam", "unet"])
def test_inside_networks(name, oracle, tmp_path):
    options = {"minisam": dict(d=16, depth=1, stem=8, width=8), "unet": dict(features=(4, 8, 8))}[name]
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    make = lambda layer, g: Blend(layer, 2, generator=g)  # noqa: E731
    oracle.in_a_network(zoo.build(name, 2, **options), make, layers, x, tmp_path)


def test_dtype_and_device_are_the_layers():
    module = Blend(nn.Conv2d(4, 6, 3, dtype=torch.bfloat16, device="meta"))
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


def test_refusals():
    for mu in (-0.1, 1.1):
        with pytest.raises(FedloraError, match=f"mu must be between 0 and 1, got {mu}"):
            Blend(nn.Linear(4, 6), mu=mu)
    with pytest.raises(FedloraError, match="rank must be at least 1, got 0"):
        Blend(nn.Linear(4, 6), 0)
    with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
        Blend(nn.Embedding(4, 6))
