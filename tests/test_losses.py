"""Cross-entropy + soft Dice against MONAI and torch."""

import pytest
import torch
import torch.nn.functional as F

from fedlora_mini.data.base import IGNORE
from fedlora_mini.losses import segmentation_loss, soft_dice_loss


def example(spatial=(8, 10), classes=3, n=4):
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, *spatial, generator=g)
    return logits.requires_grad_(), torch.randint(classes, (n, *spatial), generator=g).to(torch.uint8)


def monai_dice(logits, y):
    from monai.losses import DiceLoss

    dice = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, reduction="none", smooth_nr=1e-5, smooth_dr=1e-5
    )
    return dice(logits, y[:, None].long()).flatten(1).mean(1)  # (N, C-1, 1, …) -> (N,)


@pytest.mark.parametrize("spatial", [(8, 10), (4, 6, 5)])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_equals_monai_dice_and_torch_cross_entropy(spatial, classes):
    logits, y = example(spatial, classes)
    assert torch.allclose(soft_dice_loss(logits, y), monai_dice(logits, y), atol=1e-6)
    entropy = F.cross_entropy(logits, y.long(), reduction="none").flatten(1).mean(1)
    expected = entropy + monai_dice(logits, y)
    found = segmentation_loss(logits, y)
    assert found.shape == (4,) and torch.allclose(found, expected, atol=1e-6)
    a, b = (torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (found, expected))
    assert torch.allclose(a, b, atol=1e-7)


def test_a_class_that_is_absent():
    """Where a class occurs in no voxel, 2*0 + s over sum p + s: small but finite, and its gradient too."""
    logits, y = example()
    y[:, ...] = y.clamp(max=1)  # class 2 never occurs
    y[0] = 0  # an image without any foreground
    assert torch.allclose(soft_dice_loss(logits, y), monai_dice(logits, y), atol=1e-6)
    (g,) = torch.autograd.grad(segmentation_loss(logits, y).sum(), logits)
    assert torch.isfinite(g).all() and g.abs().max() > 0


def test_ignored_voxels_have_exactly_zero_gradient_and_no_say():
    logits, y = example()
    y[:, :3, :4] = IGNORE
    found = segmentation_loss(logits, y)
    (g,) = torch.autograd.grad(found.sum(), logits)
    ignored = (y == IGNORE)[:, None].expand_as(logits)
    assert torch.equal(g[ignored], torch.zeros(int(ignored.sum())))
    assert g[~ignored].abs().max() > 0
    other = logits.detach().clone()
    other[ignored] = 1e3
    assert torch.allclose(segmentation_loss(other, y), found, atol=1e-6)


def test_it_is_the_loss_of_the_voxels_that_are_judged():
    logits, y = example((8, 10))
    y[:, 5:] = IGNORE
    assert torch.allclose(segmentation_loss(logits, y), segmentation_loss(logits[:, :, :5], y[:, :5]), atol=1e-6)


def test_an_image_that_is_ignored_altogether():
    logits, y = example()
    y[1] = IGNORE
    found = segmentation_loss(logits, y)
    (g,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(found).all() and not g[1].any() and torch.isfinite(g).all()


def test_samples_do_not_see_each_other():
    logits, y = example()
    whole = segmentation_loss(logits, y)
    alone = torch.cat([segmentation_loss(logits[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-6)


def test_perfect_and_worst():
    _, y = example()
    right = 50 * F.one_hot(y.long(), 3).movedim(-1, 1).float()
    assert segmentation_loss(right, y).max() < 1e-3
    assert soft_dice_loss(right.roll(1, 1), y).min() > 0.99


def test_half_precision_logits():
    logits, y = example()
    assert segmentation_loss(logits.bfloat16(), y).dtype == torch.float32
