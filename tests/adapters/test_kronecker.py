"""ALoRE: Σ S_i ⊗ D_i U_i by torch.kron, and as blocks that are added up one at a time."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import LoRA, call, trainable
from fedlora_mini.adapters.base import delta_of
from fedlora_mini.adapters.kronecker import ALoRE
from fedlora_mini.adapters.ops import matrix_shape, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, stack

LAYERS = {  # how to make it, a batch, k
    "linear": (lambda: nn.Linear(8, 12), (4, 8), 4),
    "tokens": (lambda: nn.Linear(8, 12, bias=False), (4, 5, 8), 4),
    "map": (lambda: nn.Linear(6, 12), (4, 3, 2, 6), 3),
    "no common divisor": (lambda: nn.Linear(3, 8), (4, 3), 1),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1, padding_mode="replicate"), (4, 4, 7), 4),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6), 2),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1, padding_mode="circular"), (4, 8, 5, 5), 2),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 4, 5, 5), 1),
    "pointwise": (lambda: nn.Conv2d(4, 8, 1), (4, 4, 3, 3), 4),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, dilation=2, padding="same", bias=False), (4, 4, 4, 3, 4), 4),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1), (4, 4, 3, 3), 4),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(8, 12, 3, stride=2, groups=2), (4, 8, 5), 2),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 4, 2, stride=2, bias=False), (4, 4, 2, 2, 2), 4),
}
MODELS = {
    "minisam": (lambda: zoo.build("minisam", 2, d=16, depth=2, stem=8, width=8), 16),
    "unet": (lambda: zoo.build("unet", 2, features=(4, 8, 8)), 16),
    "swin_unetr": (lambda: zoo.build("swin_unetr", 2), 64),
}


def on(layer, rank=2):
    make, shape, _ = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return ALoRE(make().double(), rank, generator=g), torch.randn(shape, generator=g).double()


@pytest.mark.parametrize("layer", LAYERS)
def test_promises(layer, oracle):
    oracle.every_promise(*on(layer))


@pytest.mark.parametrize("layer", LAYERS)
def test_delta_is_a_sum_of_kronecker_products(layer, oracle):
    """In every group of a convolution one, with the group's rows of D."""
    module, x = on(layer)
    oracle.randomise(module)
    k, g = module.k, getattr(module.base, "groups", 1)
    S, U, D = module.S, module.U, module.D
    assert k == LAYERS[layer][2]
    rows = []
    for j in range(g):
        D_j = D.chunk(g, 1)[j]
        rows.append(sum(torch.kron(S[i], D_j[i] @ U[i]) for i in range(k)))
    M = torch.cat(rows)
    assert M.shape == matrix_shape(module.base)
    assert oracle.close(module.delta(), to_weight(module.base, M))
    bias = {} if module.base.bias is None else {"bias": torch.zeros_like(module.base.bias)}
    expected = functional_call(module.base, {"weight": to_weight(module.base, M)} | bias, (x,))
    assert oracle.close(module(x) - module.base(x), expected, 1e-9)


def test_block_by_block(oracle):
    """y_a = Σ_i Σ_b S_i[a, b] D_i U_i x_b on a convolution, the blocks being channels."""
    module, x = on("conv1d")
    oracle.randomise(module)
    experts = []
    for i in range(4):
        conv = nn.Conv1d(1, 2, 3, padding=1, padding_mode="replicate", bias=False).double()
        conv.weight.data = (module.D[i] @ module.U[i]).detach().reshape(2, 1, 3)
        experts.append(conv)
    for a in range(4):
        expected = sum(module.S[i, a, b] * experts[i](x[:, b : b + 1]) for i in range(4) for b in range(4))
        assert oracle.close((module(x) - module.base(x))[:, 2 * a : 2 * a + 2], expected, 1e-9)


def test_one_block_is_lora_times_a_number(oracle):
    module, x = on("depthwise")
    oracle.randomise(module)
    lora = LoRA(module.base, 2)
    with torch.no_grad():
        lora.A.copy_(module.U[0])
        lora.B.copy_(module.S[0, 0, 0] * module.D[0])
    assert oracle.close(module(x), lora(x))


def test_rank_grows_to_blocks_squared_times_r(oracle):
    module = ALoRE(nn.Linear(32, 32).double(), rank=1, blocks=4)
    oracle.randomise(module)
    assert torch.linalg.matrix_rank(module.delta()) == 16
    assert sum(v.numel() for v in trainable(module).values()) == 4**3 + 1 * (32 + 32)


@pytest.mark.parametrize("layer", LAYERS)
def test_count(layer):
    module, _ = on(layer)
    assert sum(v.numel() for v in trainable(module).values()) == module.k**3 + 2 * sum(matrix_shape(module.base))


@pytest.mark.parametrize("layer", ["tokens", "grouped", "transposed, grouped"])
def test_delta_with_a_group_axis(layer, oracle):
    module, _ = on(layer)
    states = [clone(trainable(oracle.randomise(module, seed))) for seed in range(3)]
    stacked = delta_of(module, stack(states))
    for g, state in enumerate(states):
        assert oracle.close(stacked[g], delta_of(module, state))
    mixed = delta_of(module, states[0] | {"D": stack(states)["D"]})
    assert oracle.close(mixed[2], delta_of(module, states[0] | {"D": states[2]["D"]}))


def test_the_start():
    module = ALoRE(nn.Linear(64, 128), rank=3, generator=torch.Generator().manual_seed(0))
    assert not module.D.any() and not module.delta().any()
    assert 0.4 < module.S.abs().max() <= 4**-0.5 and 0.2 < module.U.abs().max() <= 16**-0.5
    again = ALoRE(nn.Linear(64, 128), rank=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.S, again.S) and torch.equal(module.U, again.U)


@pytest.mark.parametrize("name", MODELS)
def test_inside_networks(name, oracle, tmp_path):
    build, side = MODELS[name]
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    oracle.in_a_network(build(), lambda layer, g: ALoRE(layer, 2, generator=g), layers, x, tmp_path)


def test_refusals():
    for options in ({"rank": 0}, {"blocks": 0}):
        with pytest.raises(FedloraError, match="rank and blocks must be at least 1"):
            ALoRE(nn.Linear(4, 6), **options)
    with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
        ALoRE(nn.Embedding(4, 6))
    module = ALoRE(nn.Linear(4, 6))
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(module, {n: v.expand(3, *v.shape) for n, v in trainable(module).items()}, torch.randn(4, 3, 4))
