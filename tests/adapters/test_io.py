"""Folders that hold an adapter: complete, checked, never pickled.

Every row's round trip is in tests/test_contract_adapters.py, the exchange with peft itself in tests/peers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlora_mini.adapters import Dense, LoRA, adapters, inject, merge, prepare, trainable
from fedlora_mini.adapters.io import CONFIG, TENSORS, load, save
from fedlora_mini.errors import FedloraError
from fedlora_mini.models.minisam import MiniSAM
from fedlora_mini.state import digest

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plain(**options):
    torch.manual_seed(0)
    return MiniSAM(**(dict(depth=1, d=16, width=8) | options))


def adapted(**options):
    model = prepare(plain(), "lora", **(dict(rank=2, alpha=3.0) | options))
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return model


def linears(model, alpha=3.0, rslora=False):
    """LoRA on the encoder's Linear and Conv2d layers, with another rank on the first block's way up."""

    def make(layer, generator):
        rank = 3 if isinstance(layer, nn.Linear) and layer.out_features == 32 else 2
        return LoRA(layer, rank, alpha + rank, rslora, generator)

    inject(model.requires_grad_(False), make, lambda path, module: path.startswith("encoder"))
    for _, adapter in adapters(model):
        nn.init.normal_(adapter.B, std=0.1)
    return model


def test_what_is_written(tmp_path):
    model = adapted()
    assert save(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [CONFIG, TENSORS]  # no temporary file is left
    config = json.loads((tmp_path / "a" / "b" / CONFIG).read_text())
    assert (config["format"], config["recipe"]) == ("fedlora_mini", "lora")
    assert config["adapters"]["encoder.patch"] == {
        "class": "LoRA",
        "config": {"rank": 2, "alpha": 3.0, "rslora": False},
    }
    assert digest(load_file(tmp_path / "a" / "b" / TENSORS)) == digest(trainable(model))


def test_a_merged_model_saves_the_same(tmp_path):
    model = adapted()
    before = digest(trainable(model))
    save(merge(model), tmp_path)
    assert digest(trainable(load(plain(), tmp_path))) == before
    with pytest.raises(FedloraError, match=r"unmerge"):
        load(model, tmp_path)


def test_factors_that_are_frozen_now_are_saved_too(tmp_path):
    model = adapted()
    for _, adapter in adapters(model):
        if isinstance(adapter, LoRA):
            adapter.A.requires_grad_(False)
    save(model, tmp_path)
    assert torch.equal(load(plain(), tmp_path)(X), model(X))


def test_half_precision_stays(tmp_path):
    model = adapted().bfloat16()
    loaded = load(plain().bfloat16(), save(model, tmp_path))
    assert digest(trainable(loaded)) == digest(trainable(model))


def test_a_second_save_replaces_the_first(tmp_path):
    save(adapted(), tmp_path)
    second = adapted(rank=3)
    save(second, tmp_path)
    assert torch.equal(load(plain(), tmp_path)(X), second(X))


def test_another_network_is_refused_and_left_as_it_was(tmp_path):
    save(adapted(), tmp_path)
    wider = plain(d=32)
    before = digest(wider.state_dict())
    with pytest.raises(
        FedloraError, match=r"does not fit MiniSAM: 'decoder.up1.A' is \(2, 64\) in the file and .*more"
    ):
        load(wider, tmp_path)
    assert digest(wider.state_dict()) == before and not list(adapters(wider))
    with pytest.raises(FedloraError, match=r"Sequential has no layer 'encoder"):
        load(nn.Sequential(nn.Linear(2, 2)), tmp_path)


def test_another_adapter_is_refused(tmp_path):
    save(adapted(), tmp_path)
    with pytest.raises(FedloraError, match=r"'rank': 3.*'rank': 2"):
        load(adapted(rank=3), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.d"), "no 'head.d' in the file"),
        (lambda t: t.update({"head.x": torch.zeros(1)}), "'head.x' is not in the model"),
        (lambda t: t.update({"head.d": torch.zeros(9)}), r"'head.d' is \(9,\) in the file and \(2,\)"),
    ],
)
def test_names_and_shapes_are_checked(tmp_path, change, message):
    save(adapted(), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(FedloraError, match=r"damaged or belongs to another"):
        load(plain(), tmp_path)
    rewrite(tmp_path, digest=digest(tensors))
    with pytest.raises(FedloraError, match=message):
        load(plain(), tmp_path)


def rewrite(folder, **entries):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | entries))


def test_damaged_folders(tmp_path):
    with pytest.raises(FedloraError, match=f"no {CONFIG} and no {TENSORS}"):
        load(plain(), tmp_path)
    save(adapted(), tmp_path)
    rewrite(tmp_path, adapters={"head": {"class": "os.system", "config": {}}})
    with pytest.raises(FedloraError, match=r"unknown adapter class 'os.system'; accepted: .*LoRA"):
        load(plain(), tmp_path)
    rewrite(tmp_path, adapters={"head": {"class": "LoRA", "config": {"rnak": 2}}})
    with pytest.raises(FedloraError, match=r"'head' cannot be rebuilt.*rnak"):
        load(plain(), tmp_path)
    rewrite(tmp_path, format="other")
    with pytest.raises(FedloraError, match=r"neither of fedlora_mini nor of peft"):
        load(plain(), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(FedloraError, match=r"cannot be read"):
        load(plain(), tmp_path)
    save(adapted(), tmp_path)
    (tmp_path / TENSORS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(FedloraError, match=r"cannot be read"):
        load(plain(), tmp_path)


def test_nothing_to_save_and_unknown_formats(tmp_path):
    with pytest.raises(FedloraError, match=r"trains nothing"):
        save(plain().requires_grad_(False).eval(), tmp_path)
    with pytest.raises(FedloraError, match=r"unknown format 'pefd'.*Did you mean 'peft'"):
        save(adapted(), tmp_path, format="pefd")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_peft_format_comes_back(tmp_path, rslora):
    model = linears(plain(), rslora=rslora)
    loaded = load(plain(), save(model, tmp_path, format="peft"))
    assert digest(trainable(loaded)) == digest(trainable(model))
    assert torch.equal(loaded(X), model(X))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 2 and config["rank_pattern"] == {"^encoder\\.blocks\\.0\\.up": 3}
    assert config["use_rslora"] is rslora


@pytest.mark.parametrize("merged", [False, True])
def test_a_dense_head_travels_as_a_module_to_save(tmp_path, merged):
    model = linears(plain())
    inject(model, lambda layer, g: Dense(layer), lambda path, module: path == "head")
    nn.init.normal_(model.head.D)
    nn.init.normal_(model.head.d)
    expected = model(X).detach()
    save(merge(model) if merged else model, tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["head"]
    assert torch.allclose(load(plain(), tmp_path)(X), expected, atol=1e-5)


def test_the_peft_format_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(FedloraError, match=r"'decoder.up1' is a ConvTranspose2d"):
        save(adapted(), tmp_path, format="peft")
    with pytest.raises(FedloraError, match=r"not head \(Dense\)|not .* without"):
        save(prepare(plain(), "head"), tmp_path, format="peft")
    dilated = inject(nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2)), lambda layer, g: LoRA(layer))
    with pytest.raises(FedloraError, match=r"'0' has groups, dilation or a padding mode"):
        save(dilated, tmp_path, format="peft")
    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(both, lambda layer, g: LoRA(layer, rslora=layer is both[0]))
    with pytest.raises(FedloraError, match=r"use_rslora"):
        save(both, tmp_path, format="peft")


@pytest.mark.parametrize(
    "entry",
    [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"peft_type": "LOHA"}],
)
def test_what_peft_can_and_we_cannot_is_refused(tmp_path, entry):
    save(linears(plain()), tmp_path, format="peft")
    rewrite(tmp_path, **entry)
    with pytest.raises(FedloraError, match=next(iter(entry.values())) if "peft_type" in entry else next(iter(entry))):
        load(plain(), tmp_path)
