"""(IA)³: rows, columns or the last two thirds of the rows are scaled; inside attention these are K and V."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlora_mini.adapters import call, inject, trainable
from fedlora_mini.adapters.base import delta_of, freeze
from fedlora_mini.adapters.gate import IA3
from fedlora_mini.adapters.places import activations, keys_values
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.models.minisam import Block

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (4, 4)),
    "tokens": (lambda: nn.Linear(4, 6, bias=False), (4, 5, 4)),
    "map": (lambda: nn.Linear(4, 6), (4, 3, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="circular"), (4, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same", bias=False), (4, 4, 4, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 4, 3, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (4, 4, 2, 2, 2)),
}
MODELS = {
    "minisam": (lambda: zoo.build("minisam", 2, d=16, depth=2, stem=8, width=8), 16),
    "unet": (lambda: zoo.build("unet", 2, features=(4, 8, 8)), 16),
    "swin_unetr": (lambda: zoo.build("swin_unetr", 2), 64),
}


def on(layer, side):
    make, shape = LAYERS[layer]
    return IA3(make().double(), side), torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()


CASES = [(layer, side) for layer in LAYERS for side in ("in", "out")]
CASES += [("linear", "kv"), ("tokens", "kv"), ("map", "kv")]


@pytest.mark.parametrize(("layer", "side"), CASES)
def test_promises(layer, side, oracle):
    oracle.every_promise(*on(layer, side))


@pytest.mark.parametrize("layer", LAYERS)
def test_channel_by_channel(layer, oracle):
    """The output is linear in what one channel brings in, and a scaled output is the output times a number."""
    module, x = on(layer, "in")
    oracle.randomise(module)
    axis = x.dim() - 1 if isinstance(module.base, nn.Linear) else 1
    bias = module.base(torch.zeros_like(x))
    expected = bias.clone()
    for c in range(4):
        alone = torch.zeros_like(x)
        alone.select(axis, c).copy_(x.select(axis, c))
        expected = expected + module.l[c] * (module.base(alone) - bias)
    assert oracle.close(module(x), expected)

    module, x = on(layer, "out")
    oracle.randomise(module)
    for c in range(len(module.l)):
        assert oracle.close(module(x).select(axis, c), module.l[c] * module.base(x).select(axis, c))


def test_keys_and_values_are_scaled_and_queries_are_not(oracle):
    """Attention written by hand with l_k ⊙ K and l_v ⊙ V, in MiniSAM's block."""
    block = freeze(Block(d=8, heads=2, ratio=2).double())
    z = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    x = block.norm1(z)
    q, k, v = block.qkv(x).chunk(3, -1)
    inject(block, lambda layer, g: IA3(layer, "kv"), keys_values)
    oracle.randomise(block)
    l_k, l_v = block.qkv.l.chunk(2)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        attention = ((q[..., h] @ (l_k * k)[..., h].mT) / 2).softmax(-1)
        heads.append(attention @ (l_v * v)[..., h])
    a = z + block.proj(torch.cat(heads, -1))
    assert oracle.close(block(z), a + block.down(F.gelu(block.up(block.norm2(a)))))


def test_monai_orders_its_fused_outputs_the_same_way(oracle):
    """q, k, v are thirds: with l_v = 0 nothing passes, with l_k = 0 every token gets the mean value."""
    from monai.networks.blocks import SABlock
    from monai.networks.nets.swin_unetr import WindowAttention

    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    for attention, end, inputs in (
        (SABlock(8, 2, qkv_bias=True), "out_proj", (x,)),
        (WindowAttention(8, 2, (2, 2), qkv_bias=True), "proj", (x, None)),
    ):
        freeze(attention).get_submodule(end).bias.data.zero_()
        if hasattr(attention, "relative_position_bias_table"):
            attention.relative_position_bias_table.data.zero_()
        inject(attention, lambda layer, g: IA3(layer, "kv"), keys_values)
        l = attention.qkv.l
        l.data[8:] = 0
        assert not attention(*inputs).any()
        l.data[8:], l.data[:8] = 1, 0
        y = attention(*inputs)
        assert oracle.close(y, y.mean(1, keepdim=True).expand_as(y), 1e-6)


def test_the_inner_activations_of_an_mlp(oracle):
    block = freeze(Block(d=8, heads=2, ratio=2).double())
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    inject(block, lambda layer, g: IA3(layer), activations)
    oracle.randomise(block)
    inner = F.gelu(block.up(x))
    assert oracle.close(block.down(inner), (block.down.l * inner) @ block.down.base.weight.T + block.down.base.bias)


@pytest.mark.parametrize(("layer", "side"), CASES)
def test_delta_with_a_group_axis(layer, side):
    module, _ = on(layer, side)
    l = torch.randn(2, len(module.l), generator=torch.Generator().manual_seed(1)).double()
    stacked = delta_of(module, {"l": l})
    assert stacked.shape == (2, *module.base.weight.shape)
    for g in range(2):
        assert torch.equal(stacked[g], delta_of(module, {"l": l[g]}))


def test_the_mean_of_l_gives_the_mean_of_delta(oracle):
    module, _ = on("conv2d", "in")
    l = torch.rand(3, 4, dtype=torch.float64)
    assert module.linear and oracle.close(delta_of(module, {"l": l.mean(0)}), delta_of(module, {"l": l}).mean(0))


@pytest.mark.parametrize("name", MODELS)
def test_inside_networks(name, oracle, tmp_path):
    build, side = MODELS[name]
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()

    def make(layer, generator):
        return IA3(layer, "kv" if isinstance(layer, nn.Linear) and layer.out_features % 3 == 0 else "in")

    model = oracle.in_a_network(build(), make, lambda p, m: keys_values(p, m) or activations(p, m), x, tmp_path)
    sides = {module.side for module in model.modules() if isinstance(module, IA3)}
    assert sides == ({"in"} if name == "unet" else {"in", "kv"})


def test_counts():
    for side, expected in (("in", 4), ("out", 6), ("kv", 4)):
        assert sum(v.numel() for v in trainable(IA3(nn.Linear(4, 6), side)).values()) == expected


def test_refusals():
    with pytest.raises(FedloraError, match=r"unknown side 'outt'; accepted: in, kv, out.* Did you mean 'out'"):
        IA3(nn.Linear(4, 6), "outt")
    for layer in (nn.Linear(4, 8), nn.Conv2d(4, 6, 1)):
        with pytest.raises(FedloraError, match="'kv' is for a linear layer with q, k and v in its outputs"):
            IA3(layer, "kv")
    with pytest.raises(FedloraError, match="no low-rank form for GroupNorm"):
        IA3(nn.GroupNorm(2, 4))
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(IA3(nn.Linear(4, 6)), {"l": torch.ones(3, 4)}, torch.randn(4, 3, 4))
