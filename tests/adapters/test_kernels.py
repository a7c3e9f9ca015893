"""One kernel per image: the same numbers as image after image under its own, forward, backward and twice backward."""

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import kernels
from fedlora_mini.adapters.ops import convolve, convolve_each

N, C = 3, 4
LAYERS = {
    "3x3": (nn.Conv2d(C, 6, 3, padding=1), (7, 6)),
    "thin": (nn.Conv2d(C, 2, 3, padding=1), (7, 6)),
    "groups": (nn.Conv2d(C, 6, 3, padding=1, groups=2), (7, 6)),
    "depthwise": (nn.Conv2d(C, 8, (1, 3), padding=(0, 1), groups=4), (7, 6)),
    "dilated": (nn.Conv2d(C, 2, (3, 2), dilation=(2, 1), padding=(0, 1)), (7, 6)),
    "padded beyond its kernel": (nn.Conv2d(C, 2, 3, padding=4), (5, 6)),
    "size 1, padded": (nn.Conv2d(C, 2, 1, padding=1), (5, 6)),
    "same": (nn.Conv2d(C, 2, (3, 4), padding="same"), (7, 6)),
    "valid": (nn.Conv2d(C, 2, 3, padding="valid"), (7, 6)),
    "reflected": (nn.Conv2d(C, 2, 3, padding=1, padding_mode="reflect"), (7, 6)),
    "not thin": (nn.Conv2d(8, 9, 3, padding=1), (5, 6)),
    "strided": (nn.Conv2d(C, 2, 3, stride=2, padding=1), (7, 6)),
    "strided beyond its kernel": (nn.Conv2d(C, 2, 2, stride=3, padding=1), (8, 7)),
    "strided on one axis": (nn.Conv2d(C, 2, (3, 4), stride=(1, 2), padding=(1, 2)), (5, 7)),
    "strided, groups": (nn.Conv2d(C, 6, 3, stride=2, padding=1, groups=2), (7, 6)),
    "strided and dilated": (nn.Conv2d(C, 2, 3, stride=2, padding=1, dilation=2), (9, 8)),
    "strided, 3D": (nn.Conv3d(C, 2, 3, stride=2, padding=1), (5, 4, 3)),
    "transposed": (nn.ConvTranspose2d(C, 2, 3, stride=2, padding=1, output_padding=1), (4, 5)),
    "transposed, groups": (nn.ConvTranspose2d(C, 6, 3, stride=2, padding=1, groups=2), (4, 5)),
    "transposed, stride 1": (nn.ConvTranspose2d(C, 2, 3, padding=2, dilation=2), (4, 5)),
    "transposed, 3D": (nn.ConvTranspose3d(C, 2, 2, stride=2), (2, 3, 2)),
    "1D": (nn.Conv1d(C, 2, 5, padding=2), (11,)),
    "3D": (nn.Conv3d(C, 2, (3, 1, 2), padding=1), (5, 4, 3)),
}


def setting(name):
    """The layer, N images and their kernels, in double precision."""
    (layer, sides), generator = LAYERS[name], torch.Generator().manual_seed(0)
    g, c = layer.groups, layer.in_channels
    shape = (N * g, layer.out_channels // g, c // g, *layer.kernel_size)
    x, own = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((N, c, *sides), shape))
    return layer, x.requires_grad_(), own.requires_grad_()


def one_by_one(layer, x, own):
    g = layer.groups
    return torch.cat([convolve(layer, x[i : i + 1], own[i * g : (i + 1) * g], g) for i in range(N)])


def agree(layer, x, own):
    found, expected = convolve_each(layer, x, own), one_by_one(layer, x, own)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, own), dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_images_under_their_own_kernels_equal_the_loop(name):
    layer, x, own = setting(name)
    agree(layer, x, own)
    seen = own.detach()[:1].expand_as(own).requires_grad_()  # one kernel that all images see
    assert seen.stride(0) == 0
    agree(layer, x, seen)


@pytest.mark.parametrize("name", ["3x3", "thin", "groups", "3D", "strided", "transposed"])
def test_gradients_have_gradients(name):
    layer, x, own = setting(name)
    assert torch.autograd.gradgradcheck(lambda x, own: convolve_each(layer, x, own), (x, own), fast_mode=True)


def test_only_what_is_asked_for_is_computed():
    layer, x, own = setting("thin")
    for leaves in ([x], [own]):
        others = [v if any(v is leaf for leaf in leaves) else v.detach() for v in (x, own)]
        y = convolve_each(layer, *others)
        mine = torch.autograd.grad(y.sum(), leaves)
        torch.testing.assert_close(mine, torch.autograd.grad(one_by_one(layer, *others).sum(), leaves))


@pytest.mark.parametrize("name", ["3x3", "thin", "groups", "3D", "strided", "transposed"])
def test_few_copies_at_a_time_give_the_same(name, monkeypatch):
    monkeypatch.setattr(kernels, "SHIFTED", 1)
    layer, x, own = setting(name)
    agree(layer, x, own)
    agree(layer, x, own.detach()[:1].expand_as(own).requires_grad_())
