"""Folders that hold an adapter: complete, checked, never pickled.

Every row's round trip is in tests/test_contract_adapters.py, the exchange with peft itself in tests/peers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlora_mini.adapters import Dense, LoRA, adapters, freeze, inject, load_state, merge, prepare, trainable, unmerge
from fedlora_mini.adapters.io import CONFIG, TENSORS, load, save
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.models import load_base, zoo
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


@pytest.mark.parametrize("method", ["fedit", "fedex", "flora"])
def test_a_client_of_a_run_comes_back_with_what_the_server_folded_into_frozen_weights(method, tmp_path):
    options = {"per_site": 4, "val": 1, "test": 1, "n_unseen": 0}
    config = RunConfig(method=method, sites="2", size=16, rounds=2, steps=2, batch=2, data_options=options)
    federation = Federation.build(config)
    assert len(list(federation.rounds())) == 2
    personal, model = federation.engine.personal(0, federation.server), federation.model
    folded = {name for name in personal if name.endswith(".base.weight")}
    assert bool(folded) == (method != "fedit")
    load_state(model, personal)
    save(model, tmp_path / "client")

    base = load_base("minisam", len(federation.data.classes))
    loaded = load(base, tmp_path / "client")
    X = federation.data.sites[0].test.images
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert digest(trainable(loaded)) == digest(trainable(model))  # what is frozen stays frozen
    assert load_file(tmp_path / "client" / TENSORS).keys() >= folded
    again = load(load_base("minisam", len(federation.data.classes)), save(merge(loaded), tmp_path / "again"))
    assert torch.equal(again.eval()(X), model(X))


def test_the_peft_format_refuses_replaced_weights(tmp_path):
    model = linears(plain())
    load_state(model, {"encoder.patch.base.weight": model.encoder.patch.base.weight + 1})
    with pytest.raises(FedloraError, match=r"replaced 'encoder.patch.base.weight'.* peft format cannot hold"):
        save(model, tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
    assert torch.equal(load(plain(), save(model, tmp_path))(X), model(X))


def change(model, name):
    model.state_dict()[name].add_(1e-3)
    return model


@pytest.mark.parametrize("name", ["encoder.patch.weight", "encoder.blocks.0.norm1.bias", "head.bias"])
def test_another_base_is_refused_and_left_as_it_was(name, tmp_path):
    save(adapted(), tmp_path)
    other = change(plain(), name)
    before = digest(other.state_dict())
    with pytest.raises(FedloraError, match=r"belongs to another base: frozen tensors of this MiniSAM differ"):
        load(other, tmp_path)
    assert digest(other.state_dict()) == before and not list(adapters(other))
    with pytest.raises(FedloraError, match=r"another base"):
        load(prepare(other, "lora", rank=2, alpha=3.0), tmp_path)
    with pytest.raises(FedloraError, match=r"another base.*number type"):
        load(plain().bfloat16(), tmp_path)


def test_the_base_is_the_same_merged_trained_or_loaded_into(tmp_path):
    model = adapted()
    expected = base_of(save(model, tmp_path))
    assert base_of(save(merge(model), tmp_path)) == expected
    load_state(unmerge(model), {name: value + 1 for name, value in trainable(model).items()})
    assert base_of(save(model, tmp_path)) == expected
    assert base_of(save(load(plain(), tmp_path), tmp_path)) == expected


def test_a_replaced_weight_is_not_of_the_base(tmp_path):
    """It comes with the folder, so that another base may have another one there."""
    model = adapted()
    load_state(model, {"encoder.patch.base.weight": model.encoder.patch.base.weight + 1})
    save(model, tmp_path)
    assert torch.equal(load(change(plain(), "encoder.patch.weight"), tmp_path)(X), model(X))
    save(adapted(), tmp_path)
    with pytest.raises(FedloraError, match=r"another base"):  # the model's is not the plain one any more
        load(model, tmp_path)


def test_statistics_of_frozen_norms_are_of_the_base_and_counters_are_not(tmp_path):
    def network():
        return zoo.build("unet_bn", 2)

    save(prepare(network(), "lora"), tmp_path)
    norm = next(name for name, _ in network().named_buffers() if name.endswith("running_mean"))
    load(change_counter(network()), tmp_path)
    with pytest.raises(FedloraError, match=r"another base"):
        load(change(network(), norm), tmp_path)


def change_counter(model):
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.add_(1)
    return model


def base_of(folder):
    return json.loads((folder / CONFIG).read_text())["base"]


def test_a_folder_of_old_says_nothing_of_the_base_and_is_read(tmp_path):
    model = adapted()
    save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["base"], config["replaced"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert torch.equal(load(plain(), tmp_path)(X), model(X))


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
    with pytest.raises(FedloraError, match=r"'decoder.up1' is a ConvTranspose2d.*inject\(freeze\(model\), .*Linear"):
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


@pytest.mark.parametrize("name", zoo.MODELS | zoo.CLASSIFIERS)
def test_the_networks_that_readme_says_the_peft_format_can_hold(name, tmp_path):
    """Row "lora" of two; by the way that the error names, those with Linear layers."""
    whole, partly = ("segresnet", "vit"), ("minisam", "unetr", "unetr3d", "swin_unetr", "swin_unetr3d")
    if name in whole:
        save(prepare(zoo.build(name, 2), "lora"), tmp_path, format="peft")
        load(zoo.build(name, 2), tmp_path)
        return
    with pytest.raises(FedloraError, match=r"the peft format here holds|that peft's LoRA does not keep") as told:
        save(prepare(zoo.build(name, 2), "lora"), tmp_path, format="peft")
    if name in partly:
        way = str(told.value).partition("alone: ")[2]
        model = eval(way, {"inject": inject, "freeze": freeze, "LoRA": LoRA, "nn": nn, "model": zoo.build(name, 2)})
        for _, adapter in adapters(model):
            nn.init.normal_(adapter.B)
        loaded = load(zoo.build(name, 2), save(model, tmp_path, format="peft"))
        assert digest(trainable(loaded)) == digest(trainable(model))


@pytest.mark.parametrize(
    "entry",
    [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"peft_type": "LOHA"}],
)
def test_what_peft_can_and_we_cannot_is_refused(tmp_path, entry):
    save(linears(plain()), tmp_path, format="peft")
    rewrite(tmp_path, **entry)
    with pytest.raises(FedloraError, match=next(iter(entry.values())) if "peft_type" in entry else next(iter(entry))):
        load(plain(), tmp_path)
