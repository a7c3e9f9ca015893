"""What does a backward pass with one thin kernel per image cost beside one with one kernel for all?"""

import torch
from timing import Row, compare, main
from torch import Tensor, nn

from fedlora_mini.adapters.ops import convolve, convolve_each

RANK, N = 4, 16


def backward(y: Tensor, x: Tensor, kernels: Tensor):
    """The gradients of both, again and again."""
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, (x, kernels), dy, retain_graph=True)


def grouped(layer: nn.Module, x: Tensor, kernels: Tensor) -> Tensor:
    """The images as groups of channels of one image, and autograd's own gradient."""
    y = convolve(layer, x.reshape(1, -1, *x.shape[2:]), kernels, len(x))
    return y.reshape(len(x), -1, *y.shape[2:])


def measure() -> list[Row]:
    """What does a backward pass with one thin kernel per image cost beside one with one kernel for all?"""
    rows = []
    for c, sides, stride in ((16, (32, 32), 1), (16, (32, 32), 2), (64, (16, 16), 1), (16, (16, 16, 16), 1)):
        dims = len(sides)
        layer = (nn.Conv2d, nn.Conv3d)[dims - 2](c, RANK, 3, stride=stride, padding=1)
        x, one = (torch.randn(shape).requires_grad_() for shape in ((N, c, *sides), (1, RANK, c, *[3] * dims)))
        each = one.detach().expand(N, *one.shape[1:]).requires_grad_()
        arms = {
            "one kernel": backward(convolve(layer, x, one, 1), x, one),
            "a grouped convolution": backward(grouped(layer, x, each), x, each),
            "shifted copies": backward(convolve_each(layer, x, each), x, each),
        }
        setting = f"{N} images, {c} channels, {' x '.join(map(str, sides))}, rank {RANK}, stride {stride}"
        rows += compare(setting, "one kernel", arms, rounds=9, memory=True)
    return rows


if __name__ == "__main__":
    main(measure)
