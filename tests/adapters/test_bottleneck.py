"""Houlsby and AdaptFormer: the definition token by token and voxel by voxel, and what an adapter promises."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlora_mini.adapters import LoRA, adapters, call, inject, trainable
from fedlora_mini.adapters.base import freeze, unload
from fedlora_mini.adapters.bottleneck import AdaptFormer, Houlsby
from fedlora_mini.adapters.places import mlps, sublayers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.models.minisam import Block

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (4, 4)),
    "tokens": (lambda: nn.Linear(4, 6, bias=False), (4, 5, 4)),
    "map": (lambda: nn.Linear(4, 6), (4, 3, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 4, 3, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, bias=False), (4, 4, 2, 2, 2)),
}
MODELS = {
    "minisam": (lambda: zoo.build("minisam", 2, d=16, depth=2, stem=8, width=8), 16),
    "unet": (lambda: zoo.build("unet", 2, features=(4, 8, 8)), 16),
    "swin_unetr": (lambda: zoo.build("swin_unetr", 2), 64),
}


def on(wrap, layer, **options):
    make, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return wrap(make().double(), rank=3, generator=g, **options), torch.randn(shape, generator=g).double()


@pytest.mark.parametrize("wrap", [Houlsby, AdaptFormer])
@pytest.mark.parametrize("layer", LAYERS)
def test_promises(wrap, layer, oracle):
    oracle.every_promise(*on(wrap, layer))


@pytest.mark.parametrize("layer", LAYERS)
def test_houlsby_token_by_token(layer, oracle):
    module, x = on(Houlsby, layer)
    oracle.randomise(module)
    y, found = module.base(x), module(x)
    if not isinstance(module.base, nn.Linear):
        y, found = y.movedim(1, -1), found.movedim(1, -1)
    flat, found = y.reshape(-1, 6), found.reshape(-1, 6)
    for h, out in zip(flat, found, strict=True):
        expected = h + module.W_up @ F.gelu(module.W_dn @ h + module.b_dn) + module.b_up
        assert oracle.close(out, expected)


def test_adaptformer_on_a_layer_alone_reads_its_input(oracle):
    module, x = on(AdaptFormer, "tokens", scale=0.7)
    oracle.randomise(module)
    for row, out in zip(x.reshape(-1, 4), module(x).reshape(-1, 6), strict=True):
        h = torch.relu(module.W_dn @ row + module.b_dn)
        assert oracle.close(out, module.base.weight @ row + 0.7 * (module.W_up @ h + module.b_up))


def test_adaptformer_on_a_convolution_is_lora_with_biases_and_relu(oracle):
    module, x = on(AdaptFormer, "conv1d", scale=0.7)
    oracle.randomise(module)
    padded, kernel = F.pad(x, (1, 1), mode="replicate"), module.W_dn.reshape(3, 4, 3)
    for n in range(4):
        for t in range(7):
            h = torch.relu(torch.einsum("rck,ck->r", kernel, padded[n, :, t : t + 3]) + module.b_dn)
            expected = module.base(x)[n, :, t] + 0.7 * (module.W_up @ h + module.b_up)
            assert oracle.close(module(x)[n, :, t], expected)


def test_adaptformer_on_a_grouped_convolution_shares_the_first_map(oracle):
    module, x = on(AdaptFormer, "conv2d", scale=0.7)
    oracle.randomise(module)
    thin = [nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double() for _ in range(2)]
    branches = []
    for j, conv in enumerate(thin):
        conv.weight.data = module.W_dn.detach().reshape(3, 2, 3, 3)
        h = torch.relu(conv(x[:, 2 * j : 2 * j + 2]) + module.b_dn.reshape(1, 3, 1, 1))
        branches.append(torch.einsum("mr,nrhw->nmhw", module.W_up[3 * j : 3 * j + 3], h))
    expected = module.base(x) + 0.7 * (torch.cat(branches, 1) + module.b_up.reshape(1, 6, 1, 1))
    assert oracle.close(module(x), expected)


def listening(oracle, scale=0.3):
    """A ViT block whose MLP has an AdaptFormer with random factors."""
    block = freeze(Block(d=8, heads=2, ratio=3).double())
    inject(block, lambda layer, g: AdaptFormer(layer, 3, scale, generator=g), mlps)
    return oracle.randomise(block), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1)).double()


def test_adaptformer_stands_beside_the_whole_mlp(oracle):
    block, z = listening(oracle)
    adapter = block.down
    assert adapter.config() == {"rank": 3, "scale": 0.3, "source": 8} and adapter.W_dn.shape == (3, 8)
    heard = []
    block.up.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    found = block(z)
    adapter.scale = 0.0
    branch = (found - block(z)).reshape(-1, 8)
    for row, out in zip(heard[0].reshape(-1, 8), branch, strict=True):
        h = torch.relu(adapter.W_dn @ row + adapter.b_dn)
        assert oracle.close(out, 0.3 * (adapter.W_up @ h + adapter.b_up), 1e-9)


def test_what_was_heard_is_used_once():
    block = Block(d=8, heads=2, ratio=2)
    inject(block, lambda layer, g: AdaptFormer(layer, generator=g), mlps)
    block(torch.randn(1, 3, 8))
    assert block.down._heard is None
    with pytest.raises(FedloraError, match="heard no input"):
        block.down(torch.randn(1, 3, 16))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_listens_to_itself(again, oracle):
    block, z = listening(oracle)
    twin, expected = again(block), block(z)
    oracle.randomise(block, seed=1)
    assert not oracle.close(block(z), expected, 1e-3)
    assert torch.equal(twin(z), expected)
    assert twin.down._heard is None and block.down._heard is None


def test_it_listens_below_another_adapter(oracle):
    """LoRA around the MLP's first layer, put there later or earlier, and taken away again."""
    block, z = listening(oracle)
    expected = block(z)
    inject(block, lambda layer, g: LoRA(layer, 2, generator=g), lambda path, module: path == "up")
    assert torch.equal(block(z), expected)  # LoRA starts at nothing
    assert oracle.close(unload(block)(z), expected)
    other = Block(d=8, heads=2, ratio=3)
    inject(other, lambda layer, g: LoRA(layer, 2, generator=g), lambda path, module: path == "up")
    inject(other, lambda layer, g: AdaptFormer(layer, generator=g), mlps)
    assert other.down.source == 8 and other(z.float()).shape == z.shape


def test_the_first_map_is_kaiming_uniform_for_what_it_reads():
    block = Block(d=8, heads=2, ratio=4)
    inject(block, lambda layer, g: AdaptFormer(layer, 16, generator=g), mlps)
    assert 32**-0.5 < block.down.W_dn.abs().max() <= 8**-0.5
    again = Block(d=8, heads=2, ratio=4)
    inject(again, lambda layer, g: AdaptFormer(layer, 16, generator=g), mlps)
    assert torch.equal(block.down.W_dn, again.down.W_dn)
    assert Houlsby(nn.Conv2d(3, 64, 7), 16).W_dn.abs().max() <= 64**-0.5


def test_only_the_end_of_an_mlp_listens():
    """The attention's output layer has the MLP's input layer beside it, too."""
    block = Block(d=8, heads=2, ratio=2)
    inject(block, lambda layer, g: AdaptFormer(layer, generator=g), sublayers)
    assert {path: a.source for path, a in adapters(block)} == {"proj": None, "down": 8}


def test_groups_of_a_listening_adapter(oracle):
    block, z = listening(oracle)
    oracle.groups_are_apart(block, z)
    oracle.rows_are_samples(block, z)


@pytest.mark.parametrize("wrap", [Houlsby, AdaptFormer])
@pytest.mark.parametrize("name", MODELS)
def test_inside_networks(wrap, name, oracle, tmp_path):
    build, side = MODELS[name]
    where = sublayers if wrap is Houlsby else mlps
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    model = oracle.in_a_network(build(), lambda layer, g: wrap(layer, 2, generator=g), where, x, tmp_path)
    if name != "unet":
        heads = {type(a.base) for _, a in adapters(model)}
        assert nn.Linear in heads and nn.Conv2d in heads


@pytest.mark.parametrize("wrap", [Houlsby, AdaptFormer])
def test_counts(wrap):
    module = wrap(nn.Conv2d(4, 6, 3), rank=3)
    n = {Houlsby: 6, AdaptFormer: 4 * 9}[wrap]
    assert sum(v.numel() for v in trainable(module).values()) == 3 * (n + 6) + 3 + 6


def test_refusals():
    for wrap in (Houlsby, AdaptFormer):
        with pytest.raises(FedloraError, match="rank must be at least 1"):
            wrap(nn.Linear(4, 6), rank=0)
        with pytest.raises(FedloraError, match="cannot be merged"):
            wrap(nn.Linear(4, 6)).merge()
        with pytest.raises(FedloraError, match="no low-rank form for LayerNorm"):
            wrap(nn.LayerNorm(4))
        module = wrap(nn.Linear(4, 6))
        with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
            call(module, {n: v.expand(3, *v.shape) for n, v in trainable(module).items()}, torch.randn(4, 3, 4))
    with pytest.raises(FedloraError, match="Conv2d ends no MLP"):
        AdaptFormer(nn.Conv2d(4, 6, 3), source=8)
    block = Block(d=8, heads=2, ratio=2)
    with pytest.raises(FedloraError, match=r"'down' reads 8 numbers, its AdaptFormer 9"):
        inject(block, lambda layer, g: AdaptFormer(layer, source=9), mlps)
    with pytest.raises(FedloraError, match=r"beside 'proj' there is no MLP input layer"):
        block = Block(d=8, heads=2, ratio=2)
        inject(block, lambda layer, g: AdaptFormer(layer, source=8), lambda path, module: path == "proj")
