"""BitFit: y + d, channel by channel, on whatever has a bias."""

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import call, trainable
from fedlora_mini.adapters.base import delta_of
from fedlora_mini.adapters.bias import Bias
from fedlora_mini.adapters.places import biased
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (4, 4), -1),
    "tokens": (lambda: nn.Linear(4, 6), (4, 5, 4), -1),
    "map": (lambda: nn.Linear(4, 6), (4, 3, 2, 4), -1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 6, 6), 1),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (4, 4, 2, 2, 2), 1),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 5, 6), -1),
    "layer norm of rows": (lambda: nn.LayerNorm(6), (4, 6), -1),
    "layer norm of a map": (lambda: nn.LayerNorm(6), (4, 3, 2, 6), -1),
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 3), 1),
    "instance norm": (lambda: nn.InstanceNorm3d(6, affine=True), (4, 6, 3, 2, 3), 1),
    "batch norm": (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 3, 3), 1),
    "batch norm of rows": (lambda: nn.BatchNorm1d(6).eval(), (4, 6), 1),
}
MODELS = {
    "minisam": (lambda: zoo.build("minisam", 2, d=16, depth=2, stem=8, width=8), 16),
    "unet": (lambda: zoo.build("unet", 2, features=(4, 8, 8)), 16),
    "attention_unet": (lambda: zoo.build("attention_unet", 2, features=(4, 8, 8)), 16),
    "swin_unetr": (lambda: zoo.build("swin_unetr", 2), 64),
}


def on(layer):
    make, shape, axis = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    base = make().double()
    for p in base.parameters():
        p.data = torch.randn(p.shape, generator=g).double()
    return Bias(base), torch.randn(shape, generator=g).double(), axis


@pytest.mark.parametrize("layer", LAYERS)
def test_promises(layer, oracle):
    oracle.every_promise(*on(layer)[:2])


@pytest.mark.parametrize("layer", LAYERS)
def test_channel_by_channel(layer, oracle):
    module, x, axis = on(layer)
    oracle.randomise(module)
    for c in range(6):
        expected = module.base(x).select(axis, c) + module.d[c]
        assert oracle.close(module(x).select(axis, c), expected)


def test_a_layer_norm_over_several_axes(oracle):
    module, x = Bias(nn.LayerNorm((3, 6)).double()), torch.randn(4, 2, 3, 6).double()
    oracle.every_promise(module, x)
    assert oracle.close(module(x), module.base(x) + module.d.reshape(1, 1, 3, 6))


def test_the_weight_stays():
    module = Bias(nn.Conv2d(4, 6, 3))
    assert not module.delta().any() and module.delta().shape == module.base.weight.shape
    assert delta_of(module, {"d": torch.ones(2, 6)}).shape == (2, *module.base.weight.shape)
    module.d.data.fill_(2.0)
    before = module.base.bias.clone()
    module.merge()
    assert torch.equal(module.base.bias, before + 2) and list(module._kept) == ["bias"]


@pytest.mark.parametrize("name", MODELS)
def test_inside_networks(name, oracle, tmp_path):
    build, side = MODELS[name]
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    plain = build()
    expected = sum(m.bias.numel() for p, m in plain.named_modules() if biased(p, m))
    model = oracle.in_a_network(plain, lambda layer, g: Bias(layer), biased, x, tmp_path)
    assert sum(v.numel() for v in trainable(model).values()) == expected


def test_refusals():
    for layer in (nn.Linear(4, 6, bias=False), nn.InstanceNorm2d(4), nn.LayerNorm(4, bias=False)):
        with pytest.raises(FedloraError, match=f"this {type(layer).__name__} has no bias"):
            Bias(layer)
    with pytest.raises(FedloraError, match="GELU is neither a linear layer, nor a convolution, nor a norm"):
        Bias(nn.GELU())
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(Bias(nn.Linear(4, 6)), {"d": torch.zeros(3, 6)}, torch.randn(4, 3, 4))
