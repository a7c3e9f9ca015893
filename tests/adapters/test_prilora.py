"""PRILoRA is LoRA, and `seen` is the norm of its unfolded inputs, in the order of A's columns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlora_mini.adapters import LoRA, call, trainable
from fedlora_mini.adapters.ops import down
from fedlora_mini.adapters.places import layers
from fedlora_mini.adapters.prilora import PRILoRA
from fedlora_mini.models import zoo
from fedlora_mini.state import stack

LAYERS = {
    "rows": (lambda: nn.Linear(5, 6), (4, 5)),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5)),
    "map": (lambda: nn.Linear(5, 6), (4, 3, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (4, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 3, 3)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def on(layer):
    make, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return PRILoRA(make().double(), 3, 5.0, generator=g), torch.randn(shape, generator=g).double()


@every_layer
def test_promises(layer, oracle):
    oracle.every_promise(*on(layer))


@every_layer
def test_it_computes_what_lora_does(layer):
    module, x = on(layer)
    lora = LoRA(module.base, 3, 5.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.A, lora.A)
    for adapter in (module, lora):
        nn.init.normal_(adapter.B, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module(x), lora(x)) and torch.equal(module.delta(), lora.delta())


@pytest.mark.parametrize("layer", ["rows", "tokens", "map"])
def test_the_inputs_of_a_linear_layer_are_its_features(layer, oracle):
    module, x = on(layer)
    module(x)
    expected = [sum(float(row[j]) ** 2 for row in x.reshape(-1, 5)) ** 0.5 for j in range(5)]
    assert oracle.close(module.seen, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 2), (1, 1)])
def test_the_inputs_of_a_convolution_are_the_channels_of_the_unfolded_image(kernel, groups, oracle):
    """Around a torus every offset of the kernel sees every voxel: the rows of `unfold` have the channel's norm each."""
    base = nn.Conv2d(4, 8, kernel, groups=groups, padding="same", padding_mode="circular").double()
    module = PRILoRA(base, 2)
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    module(x)
    wrapped = F.pad(x, (0, kernel[1] - 1, 0, kernel[0] - 1), mode="circular")
    patches = F.unfold(wrapped, kernel)  # (N, 4 k, L), the channel slowest
    patches = patches.reshape(3, groups, -1, patches.shape[-1])  # the groups share A's columns
    assert oracle.close(module.seen, patches.square().sum((0, 1, 3)).sqrt())


@every_layer
def test_the_order_is_that_of_the_columns_of_a(layer):
    """With one input alone, `seen` is zero exactly where the features A x have no gradient with respect to A."""
    module, x = on(layer)
    linear = isinstance(module.base, nn.Linear)
    axis, channels = (x.dim() - 1, 5) if linear else (1, 4)
    for c in range(channels):
        alone = torch.zeros_like(x)
        alone.select(axis, c).copy_(x.select(axis, c))
        module(alone)
        features = down(module.base, alone, module.A)
        (gradient,) = torch.autograd.grad((features * torch.randn_like(features)).sum(), module.A)
        assert torch.equal(module.seen > 0, gradient.any(0))


@every_layer
def test_every_group_sees_its_own_block(layer, oracle):
    module, x = on(layer)
    state = trainable(module)
    call(module, stack([state, state]), x)
    seen = module.seen
    assert seen.shape == (2, module.A.shape[1])
    for g, part in enumerate(x.chunk(2)):
        module(part)
        assert oracle.close(seen[g], module.seen)


def test_only_training_is_listened_to_and_leaves_no_graph():
    module, x = on("tokens")
    assert module.seen is None
    with torch.no_grad():
        module(x)
    assert module.seen is None
    module(x.requires_grad_())
    before = module.seen
    assert not before.requires_grad
    with torch.no_grad():
        module(2 * x)
    assert module.seen is before
    module(2 * x)
    assert torch.equal(module.seen, 2 * before)


@pytest.mark.parametrize("name", ["minisam", "unet"])
def test_inside_networks(name, oracle, tmp_path):
    options = dict(d=16, depth=1, stem=8, width=8) if name == "minisam" else dict(features=(4, 8, 8))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    oracle.in_a_network(
        zoo.build(name, 2, **options), lambda layer, g: PRILoRA(layer, 2, generator=g), layers, x, tmp_path
    )
