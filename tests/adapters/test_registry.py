"""Rows and placements: who may set what, which layers of every network are meant, and what `prepare` refuses."""

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import ADAPTERS, Dense, LoRA, adapters, places, prepare, trainable
from fedlora_mini.adapters.base import NORMS, matching, region
from fedlora_mini.adapters.ops import LAYERS
from fedlora_mini.adapters.ranks import by_depth, by_spectrum
from fedlora_mini.adapters.registry import BODY, Placement, Recipe
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, digest

HOMELESS = {  # rows that a network has no place for
    "prompt": set(zoo.MODELS) - {"minisam", "unetr", "unetr3d"},  # needs a plain vision transformer
    "affine": {"meshnet"},  # its norms are folded into the convolutions
}
MARKED = [pytest.param(n, marks=pytest.mark.slow) if n == "swin_unetr3d" else n for n in zoo.MODELS]


def small():
    return zoo.build("minisam", 2, d=16, depth=2, stem=8, width=8)


# ---------------------------------------------------------------- what may be set


class Wrap(LoRA):
    """An adapter that only notes its arguments."""

    def __init__(self, base, rank=4, size=1.0, colour="red", generator=None):
        super().__init__(base, rank, generator=generator)
        self.noted = {"rank": rank, "size": size, "colour": colour}


def rule(layer, depth, *, low=1, high=5):
    return round(low + (high - low) * depth)


def noted(model):
    return [a.noted for _, a in adapters(model) if isinstance(a, Wrap)]


def test_the_options_of_a_placement_are_its_adapters_arguments_or_its_rules():
    assert Placement(Wrap).options == {"rank", "size", "colour"}
    assert Placement(Wrap, fixed={"colour": "blue"}).options == {"rank", "size"}
    assert Placement(Wrap, rank=rule).options == {"low", "high", "size", "colour"}
    assert Placement(Wrap, rank=by_depth, fixed={"size": 2.0}).options == {"first", "last", "colour"}
    assert Placement(Wrap, rank=by_spectrum).options == {"tau", "largest", "size", "colour"}


def test_a_row_may_have_its_own_adapter_for_the_head_and_its_options_reach_it():
    own = Recipe("", place=(Placement(LoRA),), head=Placement(Wrap, regions=("head",), fixed={"colour": "blue"}))
    assert own.options == {"rank", "alpha", "rslora", "size"} and Recipe("").head.wrap is Dense
    for row, recipe in ADAPTERS.items():
        assert recipe.head.regions == ("head",), row
        assert not any("head" in place.regions for place in recipe.place), row  # a layer is wrapped once
    model = prepare(small(), "lcfed", sites=3)
    wraps = {region(model, path): type(adapter).__name__ for path, adapter in adapters(model)}
    assert wraps["head"] == "Calibration" and model.head.sites == 3
    assert {a.sites for _, a in adapters(model) if "sites" in a.config()} == {3}


def test_the_options_of_a_row_are_those_of_its_placements_and_are_not_what_the_row_itself_has_fixed():
    assert Recipe("", place=(Placement(Wrap, fixed={"size": 1.0}), Placement(Dense))).options == {"rank", "colour"}
    assert Recipe("").options == Recipe("", own=lambda region: True).options == frozenset()
    assert ADAPTERS["arena"].options == {"rank", "alpha", "start"} and ADAPTERS["sora"].options == {"rank", "alpha"}
    assert ADAPTERS["prilora"].options == {"first", "last", "alpha"}
    for name, recipe in ADAPTERS.items():
        for place in recipe.place:
            assert not place.options & set(place.fixed), name
            assert not place.options & {"base", "generator"}, name


def test_options_go_to_the_placements_that_know_them():
    model = zoo.build("minisam", 2, d=16, depth=1, stem=8, width=8)
    there = Placement(Wrap, places.mlps, fixed={"colour": "blue"})
    assert there.put(model, 0, {"rank": 2, "size": 3.0, "colour": "green", "other": 1})
    assert set(map(str, noted(model))) == {str({"rank": 2, "size": 3.0, "colour": "blue"})}
    assert Placement(Dense, places.layers, ("head",)).put(model, 0, {"rank": 2})


def test_a_rank_rule_sees_the_depth_grow_from_0_to_1_over_the_placements_own_layers():
    model = nn.ModuleDict({"encoder": nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), "head": nn.Linear(4, 2)})
    assert Placement(Wrap, rank=rule).put(model, 0, {"high": 9, "size": 7.0})
    assert [seen["rank"] for seen in noted(model)] == [1, 3, 5, 7, 9]
    assert {seen["size"] for seen in noted(model)} == {7.0} and type(model["head"]) is nn.Linear
    alone = nn.ModuleDict({"encoder": nn.Linear(4, 4)})
    assert Placement(Wrap, rank=rule).put(alone, 0, {}) and noted(alone)[0]["rank"] == 1


def test_a_placement_without_a_layer_changes_nothing_and_says_so():
    model = small()
    before = digest(model.state_dict())
    assert not Placement(LoRA, lambda path, module: False).put(model, 0, {})
    assert not Placement(LoRA, places.keys_values, ("decoder",)).put(model, 0, {})
    assert digest(model.state_dict()) == before and not list(adapters(model))


def test_regions_bound_a_placement():
    for regions in (("encoder",), ("decoder",), BODY, ("head",)):
        model = small()
        Placement(LoRA, regions=regions).put(model, 0, {})
        assert {region(model, path) for path, _ in adapters(model)} == set(regions)


def test_the_seed_makes_the_start_and_every_path_has_its_own():
    def start(seed):
        return trainable(prepare(small(), "lora", seed))

    first = start(0)
    assert digest(first) == digest(start(0)) != digest(start(1))
    a, b = (first[f"encoder.blocks.{i}.qkv.A"] for i in (0, 1))
    assert a.shape == b.shape and not torch.equal(a, b)
    only = Placement(LoRA, lambda path, module: path == "encoder.blocks.1.qkv")
    model = small()
    only.put(model, 0, {})
    assert torch.equal(model.get_parameter("encoder.blocks.1.qkv.A"), b)  # whatever else is adapted


# ---------------------------------------------------------------- what is refused


def test_unknown_rows_and_options_are_refused_before_the_model_is_touched():
    model = small().train()
    before = clone(model.state_dict())
    with pytest.raises(FedloraError, match=r"unknown adapter 'lroa'; accepted: adalora, .* Did you mean 'lora'"):
        prepare(model, "lroa")
    with pytest.raises(FedloraError, match=r"option of adapter 'dora' 'detatch'; accepted: alpha, detach, rank\. Did"):
        prepare(model, "dora", detatch=True)
    with pytest.raises(FedloraError, match=r"unknown option of adapter 'sora' 'start'; accepted: alpha, rank"):
        prepare(model, "sora", start="unit")  # the row's own choice
    for name in ("full", "head", "affine"):
        with pytest.raises(FedloraError, match=f"unknown option of adapter '{name}' 'rank'; accepted: none"):
            prepare(model, name, rank=4)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not list(adapters(model)) and digest(model.state_dict()) == digest(before)


@pytest.mark.parametrize("second", ["lora", "head", "full"])
def test_a_model_that_is_adapted_already_is_refused_and_keeps_what_it_trains(second):
    model = prepare(small(), "lora")
    before = trainable(model)
    with pytest.raises(FedloraError, match=r"MiniSAM has an adapter at 'encoder\.stem' already"):
        prepare(model, second)
    assert digest(trainable(model)) == digest(before) and model.recipe == "lora"


@pytest.mark.parametrize(("row", "network"), [(row, n) for row, there in HOMELESS.items() for n in sorted(there)])
def test_a_row_without_a_place_is_named(row, network):
    with pytest.raises(FedloraError, match=rf"has no place for adapter '{row}' \({ADAPTERS[row].summary[:10]}"):
        prepare(zoo.build(network, 2), row)


def test_a_row_with_one_of_its_places_is_enough():
    """(IA)³ in a convolutional network has no keys and values, Houlsby's in one without norms has none to train."""
    assert "kv" not in {getattr(a, "side", "") for _, a in adapters(prepare(zoo.build("unet", 2), "ia3"))}
    assert {type(a).__name__ for _, a in adapters(prepare(zoo.build("meshnet", 2), "houlsby"))} == {"Houlsby", "Dense"}


def test_a_model_without_head_or_regions_is_named():
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(4, 4)

    for row in ("lora", "head"):
        with pytest.raises(FedloraError, match="Headless has no layer in the region 'head'"):
            prepare(Headless(), row)
    with pytest.raises(FedloraError, match=r"'0' of Sequential has no region: set model\.regions"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "lora")


# ---------------------------------------------------------------- places on every network


@pytest.fixture(scope="module", params=MARKED)
def network(request):
    """A network after one forward and backward pass; which modules were called, in order, and their outputs' axes."""
    torch.set_num_threads(1)
    entry, model, called = zoo.MODELS[request.param], zoo.build(request.param, 2), {}

    def listen(path):
        def hook(module, inputs, output):
            called.setdefault(path, getattr(output, "ndim", 0))

        return hook

    hooks = [module.register_forward_hook(listen(path)) for path, module in model.named_modules()]
    side = 64 if request.param == "unetr" else entry.smallest  # UNETR is built for one size
    model.eval()(torch.rand(1, 3, *(side,) * entry.dims)).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return request.param, model, called


def found(model, where):
    return {path for path, _ in matching(model, where, (nn.Module,))}


def heads(model):
    return {
        path for path, module in model.named_modules() if isinstance(module, LAYERS) and region(model, path) == "head"
    }


def accepts(placement, layer):
    """Whether its adapter is defined for the layer."""
    try:
        placement.wrap.check(layer)
    except FedloraError:
        return False
    return True


def test_every_layer_and_norm_that_takes_part_is_meant_and_nothing_else(network):
    """Against what a forward pass calls and a backward pass reaches: without MONAI's norms for no cross-attention."""
    _, model, called = network
    for where, kinds in ((places.layers, LAYERS), (places.norms, NORMS)):
        used = {path for path, module in model.named_modules() if isinstance(module, kinds) and path in called}
        assert found(model, where) == used
        for path in used:
            assert all(p.grad is not None for p in model.get_submodule(path).parameters()), path
    both = found(model, places.layers) | found(model, places.norms)
    assert found(model, places.biased) == {p for p in both if getattr(model.get_submodule(p), "bias", None) is not None}
    assert found(model, places.biased)


def test_the_roles_in_a_transformer_block_are_those_of_its_layers_in_order(network):
    """d -> 3d, d -> d, d -> h, h -> d, as they are called; no linear layer outside the blocks has a role."""
    name, model, called = network
    blocks = {"minisam": 3, "unetr": 12, "unetr3d": 12, "swin_unetr": 8, "swin_unetr3d": 8}.get(name, 0)
    roles = {path: places.role(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    order = [path for path in called if roles.get(path)]
    assert len(order) == 4 * blocks
    for four in (order[i : i + 4] for i in range(0, len(order), 4)):
        block = model.get_submodule(four[0].rpartition("." if name == "minisam" else ".attn.")[0])
        assert [roles[path] for path in four] == ["qkv", "attention output", "mlp input", "mlp output"]
        assert {id(module) for module in block.modules()} >= {id(model.get_submodule(path)) for path in four}
        qkv, out, first, last = (model.get_submodule(path) for path in four)
        d, h = qkv.in_features, first.out_features
        sizes = [(layer.in_features, layer.out_features) for layer in (qkv, out, first, last)]
        assert sizes == [(d, 3 * d), (d, d), (d, h), (h, d)]
    convolutions = {p for p, module in model.named_modules() if isinstance(module, LAYERS)} - set(roles)
    for where, wanted in (
        (places.keys_values, set(order[::4])),
        (places.mlps, set(order[3::4]) | convolutions),
        (places.activations, set(order[3::4]) | convolutions),
        (places.sublayers, set(order[1::4]) | set(order[3::4]) | convolutions),
    ):
        assert found(model, where) == wanted


def test_prompts_stand_before_blocks_of_tokens_and_nowhere_else(network):
    """A block maps (N, T, d) to itself; Swin's hold windows, EfficientNet's share the name alone."""
    name, model, called = network
    there = found(model, places.blocks)
    assert len(there) == {"minisam": 3, "unetr": 12, "unetr3d": 12}.get(name, 0)
    assert all(called[path] == 3 for path in there)


def test_every_row_finds_its_places_and_no_two_placements_the_same(network):
    name, model, _ = network
    for row, recipe in ADAPTERS.items():
        places_of = [
            {p for p in found(model, place.where) if region(model, p) in place.regions} for place in recipe.place
        ]
        crowned = all(accepts(recipe.head, model.get_submodule(path)) for path in heads(model))
        assert (any(places_of) and crowned) == (bool(recipe.place) and name not in HOMELESS.get(row, ())), row
        assert sum(map(len, places_of)) == len(set().union(*places_of)), row  # a layer is wrapped once
        assert not set().union(*places_of) & heads(model), row
        for place, paths in zip(recipe.place, places_of, strict=True):
            for path in paths:
                place.wrap.check(model.get_submodule(path))
    assert heads(model)
