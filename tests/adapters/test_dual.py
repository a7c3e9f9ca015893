"""Dual and Fused: against dense weights added up, against two LoRAs, and one branch at a time."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import LoRA, adapters, call, inject, trainable
from fedlora_mini.adapters.base import delta_of, freeze
from fedlora_mini.adapters.dual import Dual, Fused, beside
from fedlora_mini.adapters.ops import matrix_shape, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.metrics.rank import pairs, ranks, singular_values
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, count, stack

LAYERS = {
    "rows": (lambda: nn.Linear(5, 6), (4, 5)),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (4, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 4, 3, 3)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_kind = pytest.mark.parametrize("kind", [Dual, Fused])


def on(layer, kind=Dual, rank=2, rank_own=3, alpha=5.0):
    make, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return kind(make().double(), rank, rank_own, alpha, generator=g), torch.randn(shape, generator=g).double()


@every_layer
@every_kind
def test_promises(layer, kind, oracle):
    oracle.every_promise(*on(layer, kind))


@every_layer
@every_kind
def test_the_definition_with_dense_weights(layer, kind, oracle):
    """y = operation(x; W_0 + s (w B A + w_own B_own A_own)), s = alpha / r of the shared branch; w = 1 in Dual."""
    module, x = on(layer, kind)
    oracle.randomise(module)
    w, w_own = module.mix.tolist() if kind is Fused else (1, 1)
    M = sum(w * torch.outer(module.B[:, i], module.A[i]) for i in range(2))
    M = M + sum(w_own * torch.outer(module.B_own[:, i], module.A_own[i]) for i in range(3))
    W = to_weight(module.base, 5 / 2 * M)
    assert oracle.close(module.delta(), W)
    assert oracle.close(module(x), functional_call(module.base, {"weight": module.base.weight + W}, (x,)))


@every_layer
def test_it_is_two_loras_beside_one_layer(layer, oracle):
    module, x = on(layer)
    oracle.randomise(module)
    both = []
    for rank, A, B in ((2, module.A, module.B), (3, module.A_own, module.B_own)):
        lora = LoRA(module.base, rank, 5 / 2 * rank)
        lora.A.data, lora.B.data = A.data, B.data
        both.append(lora.path(x))
    assert oracle.close(module(x), module.base(x) + both[0] + both[1])


def test_the_start_is_the_base_and_the_branches_are_apart(oracle):
    module, x = on("tokens", rank_own=None)
    assert torch.equal(module(x), module.base(x)) and module.rank_own == module.rank == 2
    assert not module.B.any() and not module.B_own.any()
    assert module.A.shape == module.A_own.shape and (module.A - module.A_own).norm() > 0.3 * module.A.norm()
    again, _ = on("tokens", rank_own=None)
    assert torch.equal(module.A, again.A) and torch.equal(module.A_own, again.A_own)


def test_branches_that_start_alike_learn_the_same_until_one_of_them_is_averaged(oracle):
    layer, x = nn.Linear(5, 6).double(), torch.randn(4, 5).double()
    module = Dual(layer, 2, alike=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.A, module.A_own) and module.A.data_ptr() != module.A_own.data_ptr()
    module(x).square().sum().backward()
    assert torch.equal(module.B.grad, module.B_own.grad) and module.B.grad.any()
    with pytest.raises(FedloraError, match="start alike have one rank, not 2 and 3"):
        Dual(layer, 2, 3, alike=True)


def test_the_weights_of_the_branches_choose_between_them_and_get_no_gradient(oracle):
    module, x = on("conv2d", Fused)
    plain, _ = on("conv2d")
    assert module.mix.tolist() == [1, 1] and not module.mix.requires_grad
    for each in (module, plain):
        oracle.randomise(each)
    plain.load_state_dict({name: module.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        module.mix.fill_(1.0)
    assert oracle.close(module(x), plain(x))
    for mix, silent in (((0, 1), "B"), ((1, 0), "B_own")):
        with torch.no_grad():
            module.mix.copy_(torch.tensor(mix))
        alone = call(plain, {silent: torch.zeros_like(getattr(plain, silent))}, x)
        assert oracle.close(module(x), alone)
    module(x).sum().backward()
    assert module.mix.grad is None and module.B.grad is not None


def test_the_thin_pair_has_the_rank_and_the_spectrum_of_the_sum(oracle):
    model = inject(freeze(nn.Sequential(nn.Linear(9, 8)).double()), lambda layer, g: Dual(layer, 2, 3, generator=g))
    oracle.randomise(model)
    [(_, adapter)] = adapters(model)
    state = trainable(model)
    expected = torch.linalg.svdvals(adapter.delta())
    assert torch.linalg.matrix_rank(adapter.delta()) == 5 == ranks(model, state)["0"]
    assert oracle.close(singular_values(*pairs(model, state)["0"]), expected[:5])


@pytest.mark.parametrize("layer", ["tokens", "grouped"])
@every_kind
def test_delta_with_a_group_axis(layer, kind, oracle):
    module, _ = on(layer, kind)
    states = [clone(trainable(oracle.randomise(module, seed))) for seed in range(3)]
    stacked = delta_of(module, stack(states))
    for g, state in enumerate(states):
        assert oracle.close(stacked[g], delta_of(module, state))
    mixed = delta_of(module, states[0] | {"B_own": stack(states)["B_own"]})  # what is the client's own, by client
    assert oracle.close(mixed[2], delta_of(module, states[0] | {"B_own": states[2]["B_own"]}))


def test_factors_beside_each_other_share_the_group_axis_that_one_of_them_has():
    g = torch.Generator().manual_seed(0)
    P, Q = torch.randn(3, 4, 2, generator=g), torch.randn(4, 5, generator=g)
    assert torch.equal(beside(P, Q, -1)[1], torch.hstack([P[1], Q]))
    assert torch.equal(beside(Q.T, P.mT, -2)[2], torch.vstack([Q.T, P[2].T]))


@every_layer
def test_count(layer):
    module, _ = on(layer)
    assert count(trainable(module)) == (2 + 3) * sum(matrix_shape(module.base))


@every_kind
@pytest.mark.parametrize("name", ["minisam", "unet"])
def test_inside_networks(name, kind, oracle, tmp_path):
    options = {"minisam": dict(d=16, depth=1, stem=8, width=8), "unet": dict(features=(4, 8, 8))}[name]
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    make = lambda layer, g: kind(layer, 2, 1, generator=g)  # noqa: E731
    oracle.in_a_network(zoo.build(name, 2, **options), make, layers, x, tmp_path)


@every_kind
def test_dtype_and_device_are_the_layers(kind):
    module = kind(nn.Conv2d(4, 6, 3, dtype=torch.bfloat16, device="meta"))
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


@every_kind
def test_refusals(kind):
    for rank, own in ((0, 1), (1, 0)):
        with pytest.raises(FedloraError, match=f"rank and rank_own must be at least 1, got {rank} and {own}"):
            kind(nn.Linear(4, 6), rank, own)
    with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
        kind(nn.Embedding(4, 6))
    module = kind(nn.Linear(4, 6))
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(module, {n: v.expand(3, *v.shape) for n, v in trainable(module).items()}, torch.randn(4, 5, 4))
