"""Hydra, WithRest, Experts: against loops over images and branches with every weight formed and softmax written out."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import LoRA, adapters, call, inject, merge, trainable, unload
from fedlora_mini.adapters.base import freeze
from fedlora_mini.adapters.hydra import Experts, Hydra, WithRest
from fedlora_mini.adapters.ops import matrix_shape, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import count

LAYERS = {  # how to make it, a batch, the axes that the router takes the mean over
    "rows": (lambda: nn.Linear(5, 6), (4, 5), ()),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5), (1,)),
    "map": (lambda: nn.Linear(5, 6), (4, 3, 2, 5), (1, 2)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7), (2,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6), (2, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (4, 4, 5, 5), (2, 3)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3), (2, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4), (2, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 3, 3), (2, 3)),
}
KINDS = {
    "hydra": lambda layer, g: Hydra(layer, 2, 3, 5.0, g),
    "rest": lambda layer, g: WithRest(layer, 2, 5.0, g),
    "experts": lambda layer, g: Experts(layer, 3, 3, 2, 7.5, g),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def on(layer, kind="hydra"):
    make, shape, _ = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return KINDS[kind](make().double(), g), torch.randn(shape, generator=g).double()


def branches(module):
    """B_i A_i of every branch that the router weighs, and of the one that always counts (or None)."""
    if isinstance(module, Hydra):
        return [B @ module.A for B in module.B], None
    if isinstance(module, WithRest):
        return [module.B @ module.A, module.B_rest @ module.A_rest], None
    return [B @ A for B, A in zip(module.B_own, module.A_own, strict=True)], module.B @ module.A


@every_layer
@every_kind
def test_promises(layer, kind, oracle):
    oracle.every_promise(*on(layer, kind))


@every_layer
@every_kind
def test_the_definition_image_by_image_and_branch_by_branch(layer, kind, oracle):
    """y_i = W_0 x_i + s [M +] s Σ_j ω_j(x_i) M_j x_i + b with dense M, s = 5/2."""
    module, x = on(layer, kind)
    oracle.randomise(module)
    base, axes = module.base, LAYERS[layer][2]
    routed, always = branches(module)
    for i in range(len(x)):
        mean = x[i : i + 1].mean(axes)[0] if axes else x[i]  # (c,)
        scores = [math.exp((row @ mean).item()) for row in module.router]
        M = sum(score / sum(scores) * Mj for score, Mj in zip(scores, routed, strict=True))
        M = M if always is None else M + always
        W = base.weight + to_weight(base, 5 / 2 * M)
        assert oracle.close(module(x)[i : i + 1], functional_call(base, {"weight": W}, (x[i : i + 1],))), i


@every_layer
@every_kind
def test_equal_branches_leave_nothing_to_route(layer, kind, oracle):
    module, x = on(layer, kind)
    oracle.randomise(module)
    with torch.no_grad():
        if kind == "hydra":
            module.B[:] = module.B[:1]
        elif kind == "rest":
            module.A_rest.copy_(module.A)
            module.B_rest.copy_(module.B)
        else:
            module.A_own[:], module.B_own[:] = module.A_own[:1], module.B_own[:1]
    before = module(x)
    module.router.data.neg_()
    assert oracle.close(module(x), before)


@every_layer
def test_where_each_of_them_is_lora(layer, oracle):
    """One B; nothing received and a router that knows it; no experts of one's own."""
    make, shape, _ = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    x, base = torch.rand(shape, generator=g).double() + 0.5, make().double()  # positive: so that a router can be sure
    single, rest, experts = Hydra(base, 2, 1), WithRest(base, 2), Experts(base, 2, 3)
    lora = oracle.randomise(LoRA(base, 2))
    for module in (single, rest, experts):
        oracle.randomise(module)
        with torch.no_grad():
            module.A.copy_(lora.A)
            module.B.copy_(lora.B)
    rest.router.data[0], rest.router.data[1] = 100.0, -100.0
    experts.B_own.data.zero_()
    for module in (single, rest, experts):
        assert oracle.close(module(x), lora(x)), type(module).__name__


@every_kind
def test_the_start_is_the_base_and_the_branches_part_from_it(kind):
    """Every branch that trains gets a gradient of its own in the first step."""
    module, x = on("tokens", kind)
    assert torch.equal(module(x), module.base(x))
    module(x).tanh().sum().backward()
    if kind == "rest":
        assert not module.router.any() and not module.A_rest.any() and not module.B_rest.any()
        return
    gradient = (module.B if kind == "hydra" else module.B_own).grad
    assert all((gradient[i] - gradient[j]).norm() > 1e-4 * gradient[i].norm() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_router_s_start_halves_both_pairs(oracle):
    module, x = on("conv2d", "rest")
    oracle.randomise(module)
    module.router.data.zero_()
    own, rest = branches(module)[0]
    W = module.base.weight + to_weight(module.base, 5 / 4 * (own + rest))
    assert oracle.close(module(x), functional_call(module.base, {"weight": W}, (x,)))


def test_what_is_received_is_used_and_gets_no_gradient(oracle):
    module, x = on("tokens", "rest")
    oracle.randomise(module)
    before = module(x)
    before.sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"A", "B", "router"}
    assert set(module.still) == {"A_rest", "B_rest"} and set(module.still) <= trainable(module).keys()
    assert not oracle.close(call(module, {"B_rest": -module.B_rest.detach()}, x), before, 1e-3)


def test_a_window_is_routed_by_its_own_mean(oracle):
    """Rows (images * windows, t, n), as in a Swin block: a window's output does not depend on its neighbours."""
    for kind in KINDS:
        module, _ = on("tokens", kind)
        oracle.randomise(module)
        x = torch.randn(2 * 4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
        whole = module(x)
        assert all(oracle.close(module(x[i : i + 1]), whole[i : i + 1]) for i in range(8)), kind


@pytest.mark.parametrize("name", ["minisam", "unet", "swin_unetr"])
@every_kind
def test_inside_networks(name, kind, oracle, tmp_path):
    options = {"minisam": dict(d=16, depth=1, stem=8, width=8), "unet": dict(features=(4, 8, 8))}.get(name, {})
    x = torch.rand(2, 3, *(64 if name == "swin_unetr" else 16,) * 2, generator=torch.Generator().manual_seed(0))

    def some(path, module):  # of 80 layers
        return layers(path, module) and (name != "swin_unetr" or "layers1" in path or "decoder1" in path)

    oracle.in_a_network(zoo.build(name, 2, **options), KINDS[kind], some, x.double(), tmp_path)


@every_kind
def test_it_stays_beside_the_layer_when_the_others_are_folded(kind, oracle):
    module, x = on("rows", kind)
    with pytest.raises(FedloraError, match=f"{type(module).__name__} cannot be merged"):
        module.merge()
    model = inject(freeze(nn.Sequential(nn.Linear(5, 5)).double()), KINDS[kind])
    oracle.randomise(model)
    expected = model(x)
    assert torch.equal(unload(merge(model))(x), expected) and len(list(adapters(model))) == 1


@every_layer
def test_count(layer):
    base = LAYERS[layer][0]()
    (m, n), c = matrix_shape(base), LAYERS[layer][1][-1 if isinstance(base, nn.Linear) else 1]
    assert count(trainable(Hydra(base, 2, 3))) == 2 * n + 3 * (2 * m + c)
    assert count(trainable(WithRest(base, 2))) == 2 * 2 * (m + n) + 2 * c  # half of the pairs is received
    assert count(trainable(Experts(base, 2, 3, 1))) == (2 + 3 * 1) * (m + n) + 3 * c
    assert count(trainable(Experts(base, 2, 3))) == (2 + 3 * 2) * (m + n) + 3 * c


@every_kind
def test_dtype_and_device_are_the_layers(kind):
    module = KINDS[kind](nn.Conv2d(4, 6, 3, dtype=torch.bfloat16, device="meta"), None)
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


def test_refusals():
    for rank, experts in ((0, 2), (2, 0)):
        with pytest.raises(FedloraError, match=f"rank and experts must be at least 1, got {rank} and {experts}"):
            Hydra(nn.Linear(4, 6), rank, experts)
    with pytest.raises(FedloraError, match="rank must be at least 1, got 0"):
        WithRest(nn.Linear(4, 6), 0)
    with pytest.raises(FedloraError, match="rank, experts and rank_own must be at least 1, got 2, 3 and 0"):
        Experts(nn.Linear(4, 6), 2, 3, 0)
    for kind in (Hydra, WithRest, Experts):
        with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
            kind(nn.Embedding(4, 6))
        module = kind(nn.Linear(4, 6))
        with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
            call(module, {n: v.expand(3, *v.shape) for n, v in trainable(module).items()}, torch.randn(4, 5, 4))
