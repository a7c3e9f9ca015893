"""The head's input beside the logits, and class means against a loop over voxels."""

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import call, prepare, trainable
from fedlora_mini.adapters.base import region
from fedlora_mini.adapters.features import class_means, embed, head, in_use, statistic
from fedlora_mini.data import IGNORE
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import build

SMALL = {
    "minisam": ({"d": 16, "depth": 1, "stem": 4, "width": 4}, 16),
    "unet": ({"features": (4, 8, 8)}, 16),
    "attention_unet": ({"features": (4, 8, 8)}, 16),
    "swin_unetr": ({}, 64),
    "segresnet": ({}, 16),
}
every_network = pytest.mark.parametrize("network", SMALL)


def small(network, adapter):
    options, side = SMALL[network]
    model = prepare(build(network, 3, **options), adapter)
    return model, torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


REST = {  # of the network, from z on
    "minisam": lambda model: model.head,
    "unet": lambda model: model.model[2],
    "attention_unet": lambda model: model.model[2],
    "swin_unetr": lambda model: model.out,
    "segresnet": lambda model: model.conv_final[-1],  # behind the region's norm
}


@every_network
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_logits_are_those_of_the_model_and_z_is_what_the_head_makes_them_of(network, adapter):
    model, x = small(network, adapter)
    model.eval()
    state = trainable(model)
    rng = torch.Generator().manual_seed(2)
    state = {name: value + 0.1 * torch.randn(value.shape, generator=rng).abs() for name, value in state.items()}
    with torch.no_grad():
        logits, z = embed(model, state, x)
        assert torch.equal(logits, call(model, state, x))
        for name, value in state.items():
            model.get_parameter(name).copy_(value)
        assert region(model, next(path for path, module in model.named_modules() if module is head(model))) == "head"
        torch.testing.assert_close(REST[network](model)(z), logits)
    assert len(z) == len(x) and z.dim() == x.dim()


@every_network
def test_no_hook_is_left_behind_also_after_an_error(network):
    model, x = small(network, "full")
    embed(model, trainable(model), x)
    with pytest.raises((RuntimeError, FedloraError)):
        embed(model, trainable(model), x[:, :1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_z_carries_a_gradient_to_the_body_and_none_to_the_head():
    model, x = small("minisam", "full")
    state = {name: value.requires_grad_() for name, value in trainable(model).items()}
    _, z = embed(model, state, x)
    found = dict(zip(state, torch.autograd.grad(z.sum(), list(state.values()), allow_unused=True), strict=True))
    assert {name for name, g in found.items() if g is None} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_z_is_at_least_single(dtype):
    model, x = small("minisam", "full")
    model = model.to(dtype)
    logits, z = embed(model, trainable(model), x.to(dtype))
    assert logits.dtype == dtype and z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_model_without_a_head_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model.regions = ((r"", "encoder"),)
    with pytest.raises(FedloraError, match="Sequential has no layer in the region 'head'"):
        head(model)


# ---------------------------------------------------------------- class means


def by_voxel(z, masks, classes):
    """One voxel at a time."""
    rows = [[] for _ in range(classes)]
    for n in range(len(masks)):
        for at in masks[n].ne(-1).nonzero().tolist():
            label = int(masks[n][tuple(at)])
            if label < classes:
                rows[label].append(z[(n, slice(None), *at)])
    means = [torch.stack(own).mean(0) if own else torch.zeros(z.shape[1]) for own in rows]
    return torch.stack(means), torch.tensor([float(len(own)) for own in rows])


@pytest.mark.parametrize("spatial", [(7,), (5, 4), (3, 4, 2)], ids=str)
def test_class_means_are_those_of_a_loop_over_voxels(spatial):
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, *spatial, generator=rng)
    masks = torch.randint(0, 3, (3, *spatial), generator=rng).to(torch.uint8)
    masks.flatten()[::4] = IGNORE
    means, counts = class_means(z, masks, 4)
    expected, numbers = by_voxel(z, masks, 4)
    torch.testing.assert_close(means, expected)
    assert torch.equal(counts, numbers)
    assert counts[3] == 0 and not means[3].any()
    assert counts.sum() == (masks != IGNORE).sum() < masks.numel()


def test_a_smaller_z_is_resized_to_the_masks():
    """Bilinear between the centres: halfway between two columns the mean of both, beyond the last centre its value."""
    z = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    masks = torch.arange(4).expand(1, 4, 4)  # a class a column
    means, counts = class_means(z, masks, 4)
    torch.testing.assert_close(means[:, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert counts.tolist() == [4.0] * 4


def test_the_means_have_gradients():
    z = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks = torch.tensor([[[0, 0, 1], [1, 1, 1], [0, 1, 1]]])
    [g] = torch.autograd.grad(class_means(z, masks, 2)[0][1].sum(), [z])
    torch.testing.assert_close(g, (masks == 1).unsqueeze(1).expand_as(z) / 6)


# ---------------------------------------------------------------- norms' statistics


def test_what_names_a_statistic():
    model, _ = small("attention_unet", "full")
    state = trainable(model)
    buffers = {name for name, value in model.named_buffers() if value.is_floating_point()}
    assert {name for name in state if statistic(name)} == buffers != set()


def test_a_model_in_use_writes_no_statistics_and_is_put_back_also_after_an_error():
    model, x = small("attention_unet", "full")
    state = trainable(model)
    before = {name: value.clone() for name, value in state.items()}
    with in_use(model):
        embed(model, state, x)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with pytest.raises(ValueError), in_use(model):
        raise ValueError
    assert all(module.training for module in model.modules())
    embed(model, state, x)  # … and in training they are written
    assert any(not torch.equal(state[name], value) for name, value in before.items() if statistic(name))
