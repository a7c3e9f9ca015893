"""A convolution with one kernel per image, whose kernels' gradients are matrix products.

y_i = W_i * x_i for every image i is one convolution with N times as many groups. Forward and with respect to x that
costs what the shared kernel costs; the gradient of thin kernels as a grouped convolution costs three times as much. At
stride 1 it is a correlation of two signals on one grid: shifted copies of one, times the other. The copies are made of
the side with fewer channels, on a thin path the r that leave it, not the c that enter.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

THIN = {1: 8, 2: 8, 3: 16}  # dimensions -> channels from which on a grouped convolution is as fast (measured on a CPU)
SHIFTED = 2**24  # numbers in the shifted copies that are held at once


def kernel_gradient(
    dy: Tensor, x: Tensor, size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """D[i, o, c, u] = Σ_p dy[i, o, p] x[i, c, p + dilation u - padding], x zero outside its grid.

    dy: (N, c_out, *P), x: (N, c, *Q) -> (N, c_out, c, *size): ∂L/∂W_i of a convolution of stride 1.
    """
    reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if dy[0].numel() < x[0].numel():  # D[u] = Σ_q x[q] dy[q + padding - dilation u]: the last shift comes first
        margin, grid = [r - p for r, p in zip(reach, padding, strict=True)], x.shape[2:]
        D = _shifts_times(dy, x, size, margin, dilation, grid).flip(tuple(range(2, dy.dim())))
        return D.movedim(-1, 2)
    return _shifts_times(x, dy, size, padding, dilation, dy.shape[2:]).movedim(-1, 1)


def _shifts_times(
    a: Tensor, b: Tensor, size: Sequence[int], margin: Sequence[int], step: Sequence[int], grid: Sequence[int]
) -> Tensor:
    """E[i, c, u, o] = Σ_p a[i, c, p + step u - margin] b[i, o, p] for p on b's grid: (N, c_a, *size, c_b)."""
    rows = max(1, SHIFTED // (a.shape[1] * math.prod(size) * math.prod(grid)))
    if rows < len(a):
        parts = zip(a.split(rows), b.split(rows), strict=True)
        return torch.cat([_shifts_times(*part, size, margin, step, grid) for part in parts])
    a = F.pad(a, [m for m in reversed(margin) for _ in (0, 1)])
    own, far = a.stride()[2:], [d * s for d, s in zip(step, a.stride()[2:], strict=True)]
    shifts = a.as_strided((*a.shape[:2], *size, *grid), (*a.stride()[:2], *far, *own))
    product = torch.bmm(shifts.reshape(len(a), -1, math.prod(grid)), b.flatten(2).mT)
    return product.reshape(len(a), -1, *size, b.shape[1])


class PerImage(torch.autograd.Function):
    """x: (N, g*c, *S), kernels: (N*g, c_out, c, *k) -> (N, g*c_out, *S'), image i under its own g kernels; stride 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: Tensor, padding: Sequence[int], dilation: Sequence[int], g: int
    ) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.how = padding, dilation, g
        y = torch.convolution(*_as_one(x, kernels, padding, dilation, g))
        return y.reshape(len(x), -1, *y.shape[2:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kernels = ctx.saved_tensors
        dx = dk = None
        if ctx.needs_input_grad[0]:
            one = _as_one(x, kernels, *ctx.how)
            out = dy.reshape(len(one[0]), -1, *dy.shape[2:])
            dx, _, _ = torch.ops.aten.convolution_backward(out, *one, [True, False, False])
            dx = dx.reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dy, x = (v.reshape(len(kernels), -1, *v.shape[2:]) for v in (dy, x))
            dk = kernel_gradient(dy, x, kernels.shape[3:], *ctx.how[:2])
        return dx, dk, None, None, None


def _as_one(x: Tensor, kernels: Tensor, padding: Sequence[int], dilation: Sequence[int], g: int) -> tuple[Any, ...]:
    """The arguments of one convolution: the images are groups of channels of one image.

    Not where all kernels are one seen N times (`grouped.expand`): then it is the batch's, under that one.
    """
    if kernels.stride(0) == 0:
        kernels = kernels[:g]
    else:
        x, g = x.reshape(1, -1, *x.shape[2:]), len(kernels)
    none = (0,) * len(padding)
    return x, kernels.flatten(0, 1), None, [1] * len(padding), padding, dilation, False, none, g
