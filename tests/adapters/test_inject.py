"""Wrapping: what is wrapped, what is left alone, and where the first factors come from."""

import copy

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import LoRA, adapters, inject, load_state, merge, prepare, trainable, unload, unmerge
from fedlora_mini.adapters.base import delta_of, freeze, keys, region
from fedlora_mini.errors import FedloraError
from fedlora_mini.models.minisam import MiniSAM
from fedlora_mini.state import clone


def lora(layer, generator):
    return LoRA(layer, rank=2, generator=generator)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))


def test_every_layer_by_default():
    assert [path for path, _ in adapters(inject(net(), lora))] == ["0", "2"]


def test_nothing_matches():
    with pytest.raises(FedloraError, match=r"no layer of Sequential matches.*Linear"):
        inject(net(), lora, lambda path, module: False)


def test_a_second_time_there_is_nothing_left():
    model = inject(net(), lora)
    with pytest.raises(FedloraError, match="no layer"):
        inject(model, lora)
    assert len(list(adapters(model))) == 2


def test_a_second_call_may_add_other_places():
    model = inject(net(), lora, lambda path, module: path == "0")
    inject(model, lora, lambda path, module: path == "2")
    assert [path for path, _ in adapters(model)] == ["0", "2"]


def test_attention_that_never_calls_its_layers_is_left_alone():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inject(block, lora)
    assert {path for path, _ in adapters(block)} == {"linear1", "linear2"}


def test_first_factors_depend_on_seed_and_path_alone():
    everything, one = inject(net(), lora, seed=3), inject(net(), lora, lambda path, module: path == "2", seed=3)
    assert torch.equal(everything[2].A, one[2].A)
    other = inject(net(), lora, seed=4)
    assert not torch.equal(everything[2].A, other[2].A)
    twins = inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora)
    assert not torch.equal(twins[0].A, twins[1].A)


def test_the_global_generator_is_untouched():
    model = net()
    before = torch.get_rng_state()
    inject(model, lora)
    assert torch.equal(before, torch.get_rng_state())


def test_wrapping_changes_no_output():
    model, x = net(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    assert torch.equal(inject(model, lora)(x), expected)


def test_a_layer_without_matrix_form():
    with pytest.raises(FedloraError, match=r"LayerNorm.*Linear"):
        LoRA(nn.LayerNorm(4))


def test_state_dict_and_deepcopy():
    model = prepare(MiniSAM(depth=1, d=16, width=8), rank=2)
    for _, adapter in adapters(model):
        nn.init.normal_(getattr(adapter, adapter.factors[-1]))
    x = torch.rand(1, 3, 16, 16)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    nn.init.zeros_(next(adapters(twin))[1].B)
    assert not torch.equal(twin(x), model(x))  # they share nothing
    fresh = prepare(MiniSAM(depth=1, d=16, width=8), rank=2, seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_unload_gives_a_plain_model():
    model, x = inject(net(), lora), torch.randn(2, 3, 6, 6)
    nn.init.normal_(model[0].B)
    expected, names = model(x), list(net().state_dict())
    assert torch.allclose(unload(model)(x), expected, atol=1e-5)
    assert list(model.state_dict()) == names


def test_a_merged_model_can_be_unloaded():
    model, x = inject(net(), lora), torch.randn(2, 3, 6, 6)
    nn.init.normal_(model[0].B)
    expected = merge(model)(x)
    assert torch.equal(unload(model)(x), expected)


def test_delta_of_other_factors():
    module = LoRA(nn.Conv2d(4, 6, 3), rank=2, alpha=4)
    nn.init.normal_(module.B)
    own = delta_of(module, {"A": module.A, "B": module.B})
    assert torch.equal(own, module.delta())
    stacked = {name: torch.stack([p, 2 * p]) for name, p in clone(trainable(module)).items()}
    assert torch.allclose(delta_of(module, stacked), torch.stack([own, 4 * own]), atol=1e-6)


def test_regions_and_keys():
    model = prepare(MiniSAM(depth=1, d=16, width=8), rank=2)
    found = keys(model, list(trainable(model)))
    key = found["encoder.blocks.0.qkv.A"]
    assert (key.path, key.factor, key.region, key.kind) == ("encoder.blocks.0.qkv", "A", "encoder", "linear")
    assert found["head.D"].region == "head" and found["decoder.up1.B"].kind == "conv"
    with pytest.raises(FedloraError, match=r"has no region.*regions"):
        region(net(), "0.weight")
    with pytest.raises(FedloraError, match=r"no layer 'encoder.nothing'"):
        keys(model, ["encoder.nothing.A"])


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_region_that_is_none_is_refused_at_the_first_use(wrong):
    """Before anything is adapted, whichever row it stands in."""
    rows = [(r"enc", "encoder"), (r"head", "head")]
    rows[wrong] = (rows[wrong][0], "encodr")
    model = MiniSAM(depth=1, d=16, width=8)
    model.regions = tuple(rows)
    with pytest.raises(FedloraError, match=r"unknown region 'encodr'; accepted: decoder, encoder, head.*'encoder'"):
        prepare(model, rank=2)


def test_a_state_is_refused_by_a_merged_model_and_by_one_that_it_does_not_fit():
    model = prepare(MiniSAM(depth=1, d=16, width=8), rank=2)
    start = clone(trainable(model))
    other = {name: value + 1 for name, value in start.items()}
    with pytest.raises(FedloraError, match=r"is merged: its factors do nothing; call unmerge\(model\)"):
        load_state(merge(model), other)
    for misfit in ({"nowhere.A": torch.zeros(1)}, {"head.d": torch.zeros(9)}):
        with pytest.raises(FedloraError, match=r"has no tensor|has shape"):
            load_state(unmerge(model), other | misfit)
        assert all(torch.equal(value, start[name]) for name, value in trainable(model).items())
    load_state(model, other)
    assert all(torch.equal(value, other[name]) for name, value in trainable(model).items())


def test_frozen_tensors_that_a_state_replaces_are_noted():
    model = freeze(inject(net(), lora))
    for _, adapter in adapters(model):
        adapter.requires_grad_(True).base.requires_grad_(False)
    load_state(model, trainable(model))
    assert model.replaced == set()
    load_state(model, {"0.base.weight": torch.zeros_like(model[0].base.weight)})
    load_state(copy.deepcopy(model), {"0.base.bias": torch.zeros_like(model[0].base.bias)})
    assert model.replaced == {"0.base.weight"}  # what a copy got, is the copy's
    load_state(model, trainable(model))
    assert model.replaced == {"0.base.weight"}


def test_unknown_recipe():
    with pytest.raises(FedloraError, match=r"unknown adapter 'lara'.*lora"):
        prepare(MiniSAM(depth=1), "lara")
