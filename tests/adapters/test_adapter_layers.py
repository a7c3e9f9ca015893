"""On every layer: forward = W + ΔW, merging is exact, per-sample = one by one, grouped = separate."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import ADAPTERS, Dense, LoRA, call, ops
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.adapters.ops import to_matrix, to_weight
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import clone, stack

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
N, SIDE = 4, 6


def _convolutions():
    grid = itertools.product((1, 2), (0, 1, "same"), (1, 2), (1, 2), ("zeros", "reflect", "circular", "replicate"))
    for i, (stride, padding, dilation, groups, mode) in enumerate(grid):
        options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode)
        if (padding == "same" and stride > 1) or (padding == 0 and mode != "zeros"):
            continue
        # all of the grid in 2D; in 1D and 3D zero padding in full, the other modes in turn
        for dims in (1, 2, 3) if mode == "zeros" or i % 3 == 0 else (2,):
            yield dims, CONV, dict(kernel_size=3, bias=i % 2 == 0) | options
    yield 2, CONV, dict(kernel_size=2, padding="same")  # pads one side only
    yield 2, CONV, dict(kernel_size=2, padding="same", padding_mode="circular")
    yield 2, CONV, dict(kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    yield 3, CONV, dict(kernel_size=(1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode="replicate")
    for dims in (1, 2, 3):
        yield dims, CONV, dict(kernel_size=1)


def _transposed():
    grid = itertools.product((1, 2), (0, 1), (0, 1), (1, 2), (1, 2))
    for i, (stride, padding, out, dilation, groups) in enumerate(grid):
        if out >= max(stride, dilation):
            continue
        options = dict(stride=stride, padding=padding, output_padding=out, dilation=dilation, groups=groups)
        for dims in (1, 2, 3):
            yield dims, TRANSPOSED, dict(kernel_size=3, bias=i % 2 == 0) | options
    yield 2, TRANSPOSED, dict(kernel_size=(2, 3), stride=(2, 1), padding=(0, 1), output_padding=(1, 0))


def _cases():
    """(name, make a layer, shape of x)."""
    for inner in ((), (5,), (3, 5)):  # (N, n), tokens (N, T, n), a channels-last map (N, h, w, n)
        for bias in (True, False):
            yield f"Linear-{len(inner)}-{bias}", lambda bias=bias: nn.Linear(4, 6, bias), (N, *inner, 4)
    for dims, kinds, options in (*_convolutions(), *_transposed()):
        kind, shape = kinds[dims], (N, 4, *(SIDE,) * dims)
        yield f"{kind.__name__}-{options}", lambda k=kind, o=options: k(4, 6, **o), shape


def accepts(wrap, layer):
    try:
        wrap.check(layer)
    except FedloraError:
        return False
    return True


CASES = list(_cases())
SPOT = [case for case in CASES if case[0].startswith("Linear-1")] + CASES[6::17]
OTHERS = {place.wrap for recipe in ADAPTERS.values() for place in recipe.place} - {LoRA, Dense}
OTHERS = {wrap for wrap in OTHERS if accepts(wrap, nn.Linear(4, 6))}  # norms and blocks have tests of their own
GRID = [(adapter, *case) for adapter in (LoRA, Dense) for case in CASES]
GRID += [
    (adapter, *case)
    for adapter in sorted(OTHERS, key=lambda a: a.__name__)
    for case in SPOT
    if accepts(adapter, case[1]())
]
every_layer = pytest.mark.parametrize(
    ("adapter", "make", "shape"), [g[:1] + g[2:] for g in GRID], ids=[f"{g[0].__name__}-{g[1]}" for g in GRID]
)


def adapted(adapter, make, shape, dtype=torch.float64):
    """An adapter with random factors on a random layer, a batch, and a target of the output's shape."""
    g = torch.Generator().manual_seed(0)
    layer = make().to(dtype)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g).to(dtype)
    options = {"rank": 3, "alpha": 5.0} if adapter is LoRA else {}
    module = adapter(layer, generator=g, **options)
    randomise(module, g)
    x = torch.randn(shape, generator=g).to(dtype)
    return module, x, torch.randn(module(x).shape, generator=g).to(dtype)


def factors(module):
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def randomise(module, g):
    for p in module.parameters():
        if p.requires_grad:
            p.copy_(torch.randn(p.shape, generator=g))


def loss(y, target):
    return ((y - target).tanh() ** 2).flatten(1).sum(1)


def close(a, b, tolerance):
    """Relative error of a against b."""
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-30)) < tolerance


@every_layer
def test_forward_is_the_layer_with_the_updated_weight(adapter, make, shape):
    module, x, _ = adapted(adapter, make, shape)
    if not module.merges:
        with pytest.raises(FedloraError, match="cannot be merged"):
            module.merge()
        return
    assert module.delta().shape == module.base.weight.shape
    assert close(module.folded().get("weight", module.base.weight), module.base.weight + module.delta(), 1e-12)
    assert close(module(x), functional_call(module.base, module.folded(), (x,)), 1e-10)


@every_layer
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(adapter, make, shape):
    module, x, _ = adapted(adapter, make, shape)
    before, expected = clone(module.base.state_dict()), module(x)
    if not module.merges:
        return
    module.merge()
    module.merge()  # a second time changes nothing
    assert close(module(x), expected, 1e-10)
    module.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in module.base.state_dict().items())
    assert torch.equal(module(x), expected)


@every_layer
def test_per_sample_gradients_equal_one_by_one(adapter, make, shape):
    module, x, target = adapted(adapter, make, shape)
    state = factors(module)
    found, losses = per_sample_gradients(module, state, loss, x, target)
    for i in range(N):
        alone = loss(module(x[i : i + 1]), target[i : i + 1])
        expected = torch.autograd.grad(alone.sum(), [p for p in module.parameters() if p.requires_grad])
        assert torch.allclose(losses[i], alone[0])
        for name, g in zip(state, expected, strict=True):
            assert found[name].shape == (N, *g.shape)
            assert close(found[name][i], g, 1e-10), name


@every_layer
def test_grouped_clients_equal_separate_runs(adapter, make, shape):
    module, x, target = adapted(adapter, make, shape)
    K, g = 2, torch.Generator().manual_seed(1)
    states = [{n: torch.randn(v.shape, generator=g).to(v) for n, v in factors(module).items()} for _ in range(K)]
    stacked = {name: value.requires_grad_() for name, value in stack(states).items()}
    y = call(module, stacked, x)
    gradients = torch.autograd.grad(loss(y, target).sum(), list(stacked.values()))
    for k, (state, part) in enumerate(zip(states, torch.arange(N).chunk(K), strict=True)):
        leaves = {name: value.requires_grad_() for name, value in state.items()}
        alone = call(module, leaves, x[part])
        assert close(y[part], alone, 1e-10)
        expected = torch.autograd.grad(loss(alone, target[part]).sum(), list(leaves.values()))
        for found, e in zip(gradients, expected, strict=True):
            assert close(found[k], e, 1e-10)


@pytest.mark.parametrize("adapter", [LoRA, Dense])
@pytest.mark.parametrize(("name", "make", "shape"), SPOT, ids=[case[0] for case in SPOT])
def test_per_sample_gradients_in_single_precision(adapter, name, make, shape):
    module, x, target = adapted(adapter, make, shape, torch.float32)
    found, _ = per_sample_gradients(module, factors(module), loss, x, target)
    for i in range(N):
        alone = loss(module(x[i : i + 1]), target[i : i + 1]).sum()
        expected = torch.autograd.grad(alone, [p for p in module.parameters() if p.requires_grad])
        for g, e in zip(found.values(), expected, strict=True):
            assert close(g[i], e, 1e-4)  # of either one's distance from double precision, in these layers


@pytest.mark.parametrize("adapter", [LoRA, Dense])
def test_windows_fold_back_into_their_image(adapter):
    """(images, T, n) -> (images * windows, t, n), image slowest, as in a Swin block: a row is still an image."""
    images, windows, t = 3, 4, 5
    module, x, target = adapted(adapter, lambda: nn.Linear(4, 6), (images * windows, t, 4))
    state = {
        name: value.expand(images, *value.shape).clone().requires_grad_() for name, value in factors(module).items()
    }
    gradients = torch.autograd.grad(loss(call(module, state, x), target).sum(), list(state.values()))
    for i, part in enumerate(torch.arange(images * windows).chunk(images)):
        alone = loss(module(x[part]), target[part]).sum()
        expected = torch.autograd.grad(alone, [p for p in module.parameters() if p.requires_grad])
        for g, e in zip(gradients, expected, strict=True):
            assert close(g[i], e, 1e-10)


@pytest.mark.parametrize(("name", "make", "shape"), CASES, ids=[case[0] for case in CASES])
def test_matrix_and_weight_are_inverse(name, make, shape):
    layer = make()
    assert torch.equal(to_weight(layer, to_matrix(layer, layer.weight)), layer.weight)
    lead = torch.randn(2, 3, *layer.weight.shape)
    assert torch.equal(to_weight(layer, to_matrix(layer, lead)), lead)


@pytest.mark.parametrize("adapter", [LoRA, Dense])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv2d(4, 6, 3), lambda: nn.Conv2d(4, 6, 1)])
def test_a_batch_that_does_not_divide_is_refused(adapter, make):
    module = adapter(make())
    state = {name: value.expand(3, *value.shape) for name, value in factors(module).items()}
    shape = (4, 5, 4) if isinstance(module.base, nn.Linear) else (4, 4, 6, 6)
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(module, state, torch.randn(shape))


@pytest.mark.parametrize("adapter", [LoRA, Dense])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dtype_and_device_are_the_layers(adapter, dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = adapter(nn.Conv2d(4, 6, 3).to(device, dtype))
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, device)}
    x = torch.randn(2, 4, 6, 6, device=device, dtype=dtype)
    assert module(x).dtype == dtype
    module.merge()
    assert module.base.weight.dtype == dtype


def test_scaling():
    layer = nn.Linear(4, 6)
    assert LoRA(layer, rank=4).scaling == 1
    assert LoRA(layer, rank=4, alpha=8).scaling == 2
    assert LoRA(layer, rank=4, alpha=8, rslora=True).scaling == 4
    with pytest.raises(FedloraError, match="rank"):
        LoRA(layer, rank=0)


def test_a_path_that_is_not_thin_gives_what_the_thin_one_gives():
    thin, depthwise = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    assert ops.is_thin(thin, 4) and not ops.is_thin(depthwise, 1)
    x, A, B = torch.randn(2, 16, 6, 6), torch.randn(2, 9), torch.randn(16, 2)
    expected = torch.nn.functional.conv2d(x, (B @ A).view(16, 1, 3, 3), padding=1, groups=16)
    torch.testing.assert_close(ops.lowrank(depthwise, x, A, B), expected)
    torch.testing.assert_close(ops.up(depthwise, ops.down(depthwise, x, A), B), expected)


def test_a_volume_in_channels_last_stays_so_beside_an_adapter():
    layer, x = nn.Conv3d(8, 8, 3, padding=1), torch.randn(2, 8, 4, 5, 6)
    A, B = torch.randn(2, 8 * 27), torch.randn(8, 2)
    y = ops.lowrank(layer, x.contiguous(memory_format=torch.channels_last_3d), A, B)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, ops.lowrank(layer, x, A, B), rtol=1e-4, atol=1e-4)
