"""The affine map of norms: written out by hand for each of them, with γ_0 and β_0 or without."""

import copy

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import adapters, call, inject, trainable
from fedlora_mini.adapters.affine import Affine
from fedlora_mini.adapters.base import freeze
from fedlora_mini.adapters.places import norms
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo

NORMS = {
    "layer": (lambda: nn.LayerNorm(6), (4, 5, 6)),
    "layer, rows": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer, a map": (lambda: nn.LayerNorm(6), (4, 3, 2, 6)),
    "layer, two axes": (lambda: nn.LayerNorm((3, 6)), (4, 2, 3, 6)),
    "layer, no bias": (lambda: nn.LayerNorm(6, bias=False), (4, 5, 6)),
    "layer, bare": (lambda: nn.LayerNorm(6, elementwise_affine=False), (4, 5, 6)),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 3)),
    "group, bare": (lambda: nn.GroupNorm(2, 6, affine=False), (4, 6, 3)),
    "instance1d": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 5)),
    "instance2d, bare": (lambda: nn.InstanceNorm2d(6), (4, 6, 3, 3)),
    "instance3d": (lambda: nn.InstanceNorm3d(6, affine=True), (4, 6, 2, 3, 2)),
    "instance2d, stored": (lambda: stored(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)), (4, 6, 3, 3)),
    "batch1d": (lambda: stored(nn.BatchNorm1d(6)), (4, 6)),
    "batch2d": (lambda: stored(nn.BatchNorm2d(6)), (4, 6, 3, 3)),
    "batch3d, bare": (lambda: stored(nn.BatchNorm3d(6, affine=False)), (4, 6, 2, 2, 3)),
}
MODELS = {
    "minisam": (lambda: zoo.build("minisam", 2, d=16, depth=2, stem=8, width=8), 16),
    "unet": (lambda: zoo.build("unet", 2, features=(4, 8, 8)), 16),
    "attention_unet": (lambda: zoo.build("attention_unet", 2, features=(4, 8, 8)), 16),
    "segresnet": (lambda: zoo.build("segresnet", 2), 16),
    "swin_unetr": (lambda: zoo.build("swin_unetr", 2), 64),
}


def stored(norm):
    norm.running_mean.copy_(torch.randn(6))
    norm.running_var.copy_(torch.rand(6) + 0.5)
    return norm.eval()


def on(norm, dtype=torch.float64):
    make, shape = NORMS[norm]
    g = torch.Generator().manual_seed(0)
    base = make().to(dtype)
    for p in base.parameters():
        p.data = torch.randn(p.shape, generator=g).to(dtype)
    module = Affine(base)
    module.attach(nn.Sequential(module, nn.Linear(1, 1, dtype=dtype)), "0")  # a norm may have no tensor of its own
    return module, torch.randn(shape, generator=g).to(dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_promises(norm, oracle):
    module, x = on(norm)
    oracle.rows_are_samples(module, x)
    oracle.groups_are_apart(module, x)
    if module.merges:
        oracle.merging_is_exact(module, x)
    else:
        with pytest.raises(FedloraError, match="cannot be merged"):
            module.merge()
    assert module.merges == (module.base.weight is not None and module.base.bias is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_the_start_is_the_norm_to_the_bit_and_the_config_rebuilds_it(norm, dtype, oracle):
    module, x = on(norm, dtype)
    assert torch.equal(module(x), module.base(x))
    twin = Affine(copy.deepcopy(module.base), **module.config()).to(dtype)
    oracle.randomise(module)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x)) and module(x).dtype == dtype


def statistics(norm, x):
    """Mean and variance that each kind of norm takes, by its definition."""
    if isinstance(norm, nn.LayerNorm):
        axes = tuple(range(-len(norm.normalized_shape), 0))
        return x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    if isinstance(norm, nn.GroupNorm):
        parts = [x[:, :3], x[:, 3:]]
        axes = tuple(range(1, x.dim()))
        mean = torch.cat([p.mean(axes, keepdim=True).expand_as(p) for p in parts], 1)
        return mean, torch.cat([p.var(axes, unbiased=False, keepdim=True).expand_as(p) for p in parts], 1)
    if norm.running_mean is not None:
        spread = (1, 6, *(1,) * (x.dim() - 2))
        return norm.running_mean.reshape(spread), norm.running_var.reshape(spread)
    axes = tuple(range(2, x.dim()))
    return x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)


@pytest.mark.parametrize("norm", NORMS)
def test_by_hand(norm, oracle):
    module, x = on(norm)
    oracle.randomise(module)
    base = module.base
    mean, variance = statistics(base, x)
    gamma = (1 if base.weight is None else base.weight) + module.dgamma
    beta = (0 if base.bias is None else base.bias) + module.dbeta
    last = isinstance(base, nn.LayerNorm)
    gamma, beta = (t if last else t.reshape(1, 6, *(1,) * (x.dim() - 2)) for t in (gamma, beta))
    assert oracle.close(module(x), (x - mean) / (variance + base.eps).sqrt() * gamma + beta)


def test_a_norm_without_tensors_takes_the_networks_dtype():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, dtype=torch.bfloat16), nn.InstanceNorm2d(4))
    inject(model, lambda layer, g: Affine(layer), norms, among=(nn.Module,))
    assert model[1].dgamma.dtype == model[1].dbeta.dtype == torch.bfloat16
    assert model(torch.rand(1, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_batch_norm_in_training_mode():
    """Without groups it is the batch norm; with groups it would mix them."""
    module = Affine(nn.BatchNorm2d(6))
    plain, x = copy.deepcopy(module.base), torch.randn(4, 6, 3, 3)
    assert torch.equal(module(x), plain(x))
    assert torch.equal(module.base.running_mean, plain.running_mean) and plain.running_mean.any()
    state = {name: value.expand(4, 6) for name, value in trainable(module).items() if "running" not in name}
    with pytest.raises(FedloraError, match="BatchNorm2d mixes the groups by its batch statistics"):
        call(module, state, x)
    before = module.base.running_mean.clone()
    call(module.eval(), state, x)
    assert torch.equal(module.base.running_mean, before)


@pytest.mark.parametrize("name", MODELS)
def test_inside_networks(name, oracle, tmp_path):
    build, side = MODELS[name]
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    model = oracle.in_a_network(build(), lambda layer, g: Affine(layer), norms, x, tmp_path)
    merging = {adapter.merges for _, adapter in adapters(model)}
    assert merging == {"unet": {False}, "minisam": {True}, "segresnet": {True}}.get(name, {True, False})


@pytest.mark.slow
def test_it_trains_in_a_network_without_affine_norms():
    model = freeze(zoo.build("unet", 2, features=(4, 8, 8)))
    inject(model, lambda layer, g: Affine(layer), norms, among=(nn.Module,))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    target = x.mean(1, keepdim=True).expand(-1, 2, -1, -1)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_refusals():
    with pytest.raises(FedloraError, match="Linear is no norm; accepted: LayerNorm, Group-, Instance-, BatchNorm"):
        Affine(nn.Linear(4, 6))
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(Affine(nn.GroupNorm(2, 6)), {"dgamma": torch.zeros(3, 6)}, torch.randn(4, 6, 3))
