"""What does the gradient of one thin kernel per image cost beside that of one kernel for all?"""

import torch
from timing import Row, compare, main
from torch import Tensor, nn

from fedlora_mini.adapters.ops import convolve, convolve_each

RANK, N = 4, 16


def backward(y: Tensor, kernels: Tensor):
    """The gradient of the kernels alone, again and again."""
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, kernels, dy, retain_graph=True)


def grouped(layer: nn.Module, x: Tensor, kernels: Tensor) -> Tensor:
    """The images as groups of channels of one image, and autograd's own gradient."""
    y = convolve(layer, x.reshape(1, -1, *x.shape[2:]), kernels, len(x))
    return y.reshape(len(x), -1, *y.shape[2:])


def measure() -> list[Row]:
    """What does the gradient of one thin kernel per image cost beside that of one kernel for all?"""
    rows = []
    for c, sides in ((16, (32, 32)), (64, (16, 16)), (16, (16, 16, 16))):
        dims = len(sides)
        layer = (nn.Conv2d, nn.Conv3d)[dims - 2](c, RANK, 3, padding=1)
        x, one = torch.rand(N, c, *sides), torch.randn(1, RANK, c, *[3] * dims).requires_grad_()
        each = one.detach().expand(N, *one.shape[1:]).requires_grad_()
        arms = {
            "one kernel": backward(convolve(layer, x, one, 1), one),
            "a grouped convolution": backward(grouped(layer, x, each), each),
            "shifted copies": backward(convolve_each(layer, x, each), each),
        }
        setting = f"{N} images, {c} channels, {' x '.join(map(str, sides))}, rank {RANK}"
        rows += compare(setting, "one kernel", arms, rounds=9, memory=True)
    return rows


if __name__ == "__main__":
    main(measure)
