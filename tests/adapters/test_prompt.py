"""Prompts before the tokens of a block: attention written by hand, blocks of MiniSAM and MONAI."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlora_mini.adapters import adapters, call, inject, trainable
from fedlora_mini.adapters.base import freeze
from fedlora_mini.adapters.places import blocks
from fedlora_mini.adapters.prompt import Prompt
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.models.minisam import Block


def monai_block(**options):
    from monai.networks.blocks import TransformerBlock

    return TransformerBlock(8, 16, 2, **options)


BLOCKS = {
    "minisam": lambda: Block(d=8, heads=2, ratio=2),
    "monai": monai_block,
    "torch": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
}


def on(block, tokens=3):
    g = torch.Generator().manual_seed(0)
    base = freeze(BLOCKS[block]().double())
    return Prompt(base, tokens, generator=g), torch.randn(4, 5, 8, generator=g).double()


@pytest.mark.parametrize("block", BLOCKS)
def test_promises(block, oracle):
    module, z = on(block)
    oracle.every_promise(module, z)
    assert module(z).shape == z.shape and not module.starts_at_base
    assert not oracle.close(module(z), module.base(z), 1e-6)


def test_by_hand(oracle):
    """Every token attends to the prompts and the tokens; the prompts' own outputs are gone."""
    module, z = on("minisam")
    oracle.randomise(module)
    block, d = module.base, 8
    for n in range(len(z)):
        seen = torch.cat([module.P, z[n]])  # (3 + 5, d)
        q, k, v = block.qkv(block.norm1(seen)).chunk(3, -1)
        for t in range(3, 8):
            heads = []
            for h in (slice(0, 4), slice(4, d)):
                weights = torch.stack([q[t, h] @ k[s, h] / 2 for s in range(8)]).softmax(0)
                heads.append(sum(w * v[s, h] for s, w in enumerate(weights)))
            a = z[n, t - 3] + block.proj(torch.cat(heads))
            expected = a + block.down(F.gelu(block.up(block.norm2(a))))
            assert oracle.close(module(z)[n, t - 3], expected)


def test_the_start_is_uniform_and_from_the_generator():
    P = on("minisam", tokens=200)[0].P.detach()
    a = math.sqrt(6 / (8 + 8))
    assert 0.98 * a < P.abs().max() <= a
    assert abs(float(P.var()) - a**2 / 3) < 0.1 * a**2 / 3
    assert torch.equal(P, on("minisam", tokens=200)[0].P)


def test_every_block_has_prompts_of_its_own():
    model = freeze(zoo.build("minisam", 2, d=16, depth=3, stem=8, width=8))
    inject(model, lambda layer, g: Prompt(layer, 4, generator=g), blocks, among=(nn.Module,))
    found = dict(adapters(model))
    assert list(found) == [f"encoder.blocks.{i}" for i in range(3)]
    assert not torch.equal(found["encoder.blocks.0"].P, found["encoder.blocks.1"].P)
    assert {name: v.shape for name, v in trainable(model).items()} == {f"{path}.P": (4, 16) for path in found}


def test_further_arguments_reach_monais_block(oracle):
    block = freeze(monai_block(with_cross_attention=True).double())
    z, context = torch.randn(2, 5, 8).double(), torch.randn(2, 4, 8).double()
    module = Prompt(block, 3)
    expected = block(torch.cat([module.P.expand(2, -1, -1), z], 1), context)[:, 3:]
    assert torch.equal(module(z, context), expected) and torch.equal(module(z, context=context), expected)
    assert not oracle.close(module(z, 2 * context), expected, 1e-6)


@pytest.mark.parametrize(("name", "side"), [("minisam", 16), ("unetr", 64)])
def test_inside_networks(name, side, oracle, tmp_path):
    options = dict(d=16, depth=2, stem=8, width=8) if name == "minisam" else dict(feature_size=4, hidden_size=16)
    model = zoo.build(name, 2, **options)
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    oracle.in_a_network(model, lambda layer, g: Prompt(layer, 3, generator=g), blocks, x, tmp_path)
    assert len(list(adapters(model))) == (2 if name == "minisam" else 12)


def test_refusals():
    from monai.networks.nets.swin_unetr import SwinTransformerBlock

    with pytest.raises(FedloraError, match="tokens must be at least 1"):
        Prompt(Block(8, 2, 2), 0)
    for module in (nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.LayerNorm((3, 6)))):
        with pytest.raises(FedloraError, match="no transformer block: prompts need one with a LayerNorm over d"):
            Prompt(module)
    with pytest.raises(FedloraError, match="cuts a map into windows"):
        Prompt(SwinTransformerBlock(8, 2, (2, 2), (0, 0)))
    with pytest.raises(FedloraError, match="cannot be merged"):
        Prompt(Block(8, 2, 2)).merge()
    for shape in ((4, 8), (2, 3, 3, 8), (2, 3, 9)):
        with pytest.raises(FedloraError, match=r"prompts stand before tokens \(N, T, 8\)"):
            Prompt(Block(8, 2, 2))(torch.randn(shape))
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(Prompt(Block(8, 2, 2), 2), {"P": torch.zeros(3, 2, 8)}, torch.randn(4, 5, 8))
