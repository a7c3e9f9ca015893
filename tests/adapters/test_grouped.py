"""One backward pass, one gradient per image, on every network of the zoo."""

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import LoRA, call, inject, merge, prepare, trainable
from fedlora_mini.adapters.grouped import check_groupable, expand, per_sample_gradients
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.privacy import clip_sum, norms

QUICK = ("minisam", "unet", "swin_unetr", "segresnet")
NETWORKS = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in zoo.MODELS]


def setting(name, images=3, dtype=torch.float32):
    """A network with non-zero factors and a batch of the smallest images that it takes."""
    entry, g = zoo.MODELS[name], torch.Generator().manual_seed(0)
    size = entry.smallest
    if name == "unetr":
        size = 64  # built for one size
    model = prepare(zoo.build(name, classes=2).to(dtype), "lora", rank=2)
    state = {n: v + 0.05 * torch.randn(v.shape, generator=g).to(dtype) for n, v in trainable(model).items()}
    sides = (size, size // 2, size // 2) if name == "swin_unetr3d" else (size,) * entry.dims  # a quarter of the work
    x = torch.rand(images, 3, *sides, generator=g).to(dtype)
    return model, state, x, (x.mean(1) > 0.5).to(torch.uint8)


def one_by_one(model, state, x, y):
    """The plain loop: image after image, an ordinary gradient each."""
    rows = []
    for i in range(len(x)):
        leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
        value = segmentation_loss(call(model, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        rows.append(dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True)))
    return rows


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_images_and_equal_the_loop_and_so_does_the_clipped_sum(name):
    # double: single precision alone puts 3e-5 between batch sizes in the deepest network
    model, state, x, y = setting(name, 2 if zoo.MODELS[name].dims == 3 else 3, torch.float64)
    found, losses = per_sample_gradients(model, state, segmentation_loss, x, y)
    expected = one_by_one(model, state, x, y)
    assert losses.shape == x.shape[:1]
    assert {g.shape[0] for g in found.values()} == {len(x)}
    for row, alone in zip(S.unstack(found), expected, strict=True):
        assert S.norm(S.sub(row, alone)) < 1e-10 * S.norm(alone)
    sizes = [S.norm(alone) for alone in expected]
    assert torch.allclose(norms(found), torch.tensor(sizes, dtype=x.dtype))
    C = sum(sizes) / len(sizes)  # some are clipped, some are not
    clipped = [S.scale(alone, min(1.0, C / size)) for alone, size in zip(expected, sizes, strict=True)]
    total = S.scale(S.mean(clipped, [1.0] * len(x)), len(x))
    assert S.norm(S.sub(clip_sum(found, C), total)) < 1e-10 * S.norm(total)


def test_expand_shares_one_memory():
    state = {"a.A": torch.randn(2, 3)}
    out = expand(state, 1000)["a.A"]
    assert out.shape == (1000, 2, 3) and out.requires_grad and out.is_leaf
    assert out.data_ptr() == state["a.A"].data_ptr()


def test_the_sum_of_the_rows_is_the_ordinary_gradient():
    model, state, x, y = setting("minisam")
    leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
    ordinary = torch.autograd.grad(segmentation_loss(call(model, leaves, x), y).sum(), list(leaves.values()))
    found, _ = per_sample_gradients(model, state, segmentation_loss, x, y)
    total = {n: g.sum(0) for n, g in found.items()}
    assert S.norm(S.sub(total, dict(zip(leaves, ordinary, strict=True)))) < 1e-5 * S.norm(total)


def test_tensors_without_a_group_axis_are_refused():
    model = prepare(zoo.build("minisam", classes=2), "full")
    with pytest.raises(FedloraError, match=r"'encoder.position' is no adapter's factor"):
        per_sample_gradients(model, trainable(model), segmentation_loss, torch.rand(1, 3, 16, 16), torch.zeros(1))


def test_a_batch_of_nobody():
    model, state, x, y = setting("minisam")
    found, losses = per_sample_gradients(model, state, segmentation_loss, x[:0], y[:0])
    assert losses.shape == (0,) and {n: g.shape[1:] for n, g in found.items()} == {n: v.shape for n, v in state.items()}
    assert S.norm(clip_sum(found, 1.0)) == 0


def test_merged_adapters_are_refused():
    model, state, x, y = setting("minisam")
    merge(model)
    with pytest.raises(FedloraError, match=r"merged"):
        per_sample_gradients(model, state, segmentation_loss, x, y)


def test_batch_statistics_are_refused():
    model, state, x, y = setting("attention_unet")
    model.train()
    with pytest.raises(FedloraError, match=r"mixes the samples"):
        per_sample_gradients(model, state, segmentation_loss, x, y)


def test_an_instance_norm_that_keeps_statistics_is_refused_while_it_does():
    keeping = nn.InstanceNorm2d(4, track_running_stats=True)
    with pytest.raises(FedloraError, match="instance norm 'stem' keeps the mean statistics"):
        check_groupable({"stem": keeping}, [])
    check_groupable({"stem": keeping.eval()}, [])
    check_groupable({"stem": nn.InstanceNorm2d(4)}, [])


def test_a_loss_that_is_not_per_image_is_refused():
    model, state, x, y = setting("minisam")
    with pytest.raises(FedloraError, match=r"one number per image"):
        per_sample_gradients(model, state, lambda a, b: segmentation_loss(a, b).mean(), x, y)


def test_grouped_clients_train_as_they_would_alone():
    """K clients, three SGD steps in one pass: the same states as three steps one client after the other."""
    K, b = 3, 2
    model, state, x, y = setting("minisam", images=K * b)
    starts = [S.scale(state, 1 + 0.1 * k) for k in range(K)]

    def steps(current, images, masks):
        for _ in range(3):
            leaves = {n: v.detach().requires_grad_() for n, v in current.items()}
            value = segmentation_loss(call(model, leaves, images), masks).sum() / b
            gradients = torch.autograd.grad(value, list(leaves.values()))
            current = {n: v.detach() - 0.05 * g for (n, v), g in zip(leaves.items(), gradients, strict=True)}
        return current

    together = S.unstack(steps(S.stack(starts), x, y))
    for k, part in enumerate(torch.arange(K * b).chunk(K)):
        alone = steps(starts[k], x[part], y[part])
        assert S.norm(S.sub(together[k], alone)) < 1e-5 * S.norm(alone)


def test_a_model_without_regions_works_too():
    model = inject(nn.Sequential(nn.Linear(4, 3)), lambda layer, g: LoRA(layer, 2, generator=g))
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    found, _ = per_sample_gradients(model, trainable(model), lambda a, b: (a - b).square().sum(1), x, y)
    assert found["0.B"].shape == (5, 3, 2)
