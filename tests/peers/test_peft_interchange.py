"""Adapters cross between this library and peft, in both directions, with the same output."""

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft", reason="peft is not installed here: run `make peers`")

from fedlora_mini.adapters import Dense, LoRA, adapters, inject  # noqa: E402
from fedlora_mini.adapters.io import load, save  # noqa: E402
from fedlora_mini.models.minisam import MiniSAM  # noqa: E402

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = r"encoder\.(stem|patch|blocks\.\d+\.(qkv|proj|up|down))"


def plain():
    torch.manual_seed(0)
    return MiniSAM(depth=2, d=16, width=8).eval()


def ours(rslora=False, ranks=(2, 2), head=False):
    model = plain().requires_grad_(False)

    def make(layer, generator):
        return LoRA(layer, ranks[layer.weight.dim() == 4], 5.0, rslora, generator)

    inject(model, make, lambda path, module: path.startswith("encoder"))
    if head:
        inject(model, lambda layer, g: Dense(layer), lambda path, module: path == "head")
    for _, adapter in adapters(model):
        for factor in adapter.factors:
            nn.init.normal_(getattr(adapter, factor), std=0.2)
    return model


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
@pytest.mark.parametrize("head", [False, True])
@torch.no_grad()
def test_ours_loads_in_peft(tmp_path, rslora, ranks, head):
    model = ours(rslora, ranks, head)
    save(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(plain(), str(tmp_path)).eval()
    assert distance(model(X), plain()(X)) > 1e-2
    assert distance(theirs(X), model(X)) < 1e-6
    wrapped = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 2 + 2 * 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"qkv": 6, r"blocks\.1\.up": 3}, "alpha_pattern": {"qkv": 1, "stem": 7}},
        {"modules_to_save": ["head"]},
        {"lora_dropout": 0.1, "init_lora_weights": "gaussian"},
        {"target_modules": ["qkv", "patch"]},
    ],
)
@torch.no_grad()
def test_theirs_loads_here(tmp_path, options):
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "target_modules": TARGETS} | options))
    theirs = peft.get_peft_model(plain(), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(str(tmp_path))
    model = load(plain(), tmp_path)
    assert distance(theirs(X), plain()(X)) > 1e-2
    assert distance(model(X), theirs(X)) < 1e-6


def test_their_dora_is_refused(tmp_path):
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["qkv"], use_dora=True))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="use_dora"):
        load(plain(), tmp_path)


def test_a_dilated_convolution_of_theirs_is_refused(tmp_path):
    """peft's thin convolution drops the dilation: what it trains there is no update of the layer's weight."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2))
    with torch.no_grad(), pytest.raises(RuntimeError):
        peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))(torch.rand(1, 3, 8, 8))
