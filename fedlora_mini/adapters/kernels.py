"""A convolution with one kernel per image, whose kernels' gradients are matrix products where they are thin.

y_i = W_i * x_i for every image i is one convolution with N times as many groups. Forward and with respect to x that
costs what the shared kernel costs; the gradient of thin kernels as a grouped convolution costs three times as much. At
stride 1 it is a correlation of two signals on one grid: shifted copies of one, times the other. The copies are made of
the side with fewer channels, on a thin path the r that leave it, not the c that enter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

THIN = {1: 8, 2: 8, 3: 16}  # dimensions -> channels from which on a grouped convolution is as fast (measured on a CPU)
SHIFTED = 2**24  # numbers in the shifted copies that are held at once


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves, a number per axis of space; `groups` are the channel groups of one image."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    output_padding: Sequence[int]
    transposed: bool
    groups: int


def kernel_gradient(
    dy: Tensor, x: Tensor, size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """D[i, o, c, u] = Σ_p dy[i, o, p] x[i, c, p + dilation u - padding], x zero outside its grid.

    dy: (N, c_out, *P), x: (N, c, *Q) -> (N, c_out, c, *size): ∂L/∂W_i of a convolution of stride 1.
    """
    if dy[0].numel() < x[0].numel():  # D[u] = Σ_q x[q] dy[q + padding - dilation u]: the last shift comes first
        margin = [d * (k - 1) - p for d, k, p in zip(dilation, size, padding, strict=True)]
        return _shifts_times(dy, x, size, margin, dilation).flip(tuple(range(2, dy.dim()))).movedim(-1, 2)
    return _shifts_times(x, dy, size, padding, dilation).movedim(-1, 1)


def _shifts_times(a: Tensor, b: Tensor, size: Sequence[int], margin: Sequence[int], step: Sequence[int]) -> Tensor:
    """E[i, c, u, o] = Σ_p a[i, c, p + step u - margin] b[i, o, p] for p on b's grid: (N, c_a, *size, c_b)."""
    grid = b.shape[2:]
    rows = max(1, SHIFTED // (a.shape[1] * math.prod(size) * math.prod(grid)))
    if rows < len(a):
        parts = zip(a.split(rows), b.split(rows), strict=True)
        return torch.cat([_shifts_times(*part, size, margin, step) for part in parts])
    a = F.pad(a, [m for m in reversed(margin) for _ in (0, 1)]).contiguous()
    own, far = a.stride()[2:], [d * s for d, s in zip(step, a.stride()[2:], strict=True)]
    shifts = a.as_strided((*a.shape[:2], *size, *grid), (*a.stride()[:2], *far, *own))
    product = torch.bmm(shifts.reshape(len(a), -1, math.prod(grid)), b.flatten(2).mT)
    return product.reshape(len(a), -1, *size, b.shape[1])


class PerImage(torch.autograd.Function):
    """x: (N, g*c, *S), kernels: (N*g, c_out, c, *k) -> (N, g*c_out, *S'), image i under its own g kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, move: Geometry) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.move = move
        y = torch.convolution(*_as_one(x, kernels, move))
        return y.reshape(len(x), -1, *y.shape[2:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Thin kernels at stride 1 by shifted copies, others as the grouped convolution that they are."""
        (x, kernels), move = ctx.saved_tensors, ctx.move
        for_x, for_kernels = ctx.needs_input_grad[:2]
        thin = min(kernels.shape[1:3]) < THIN[x.dim() - 2]
        if not for_kernels or (thin and not move.transposed and math.prod(move.stride) == 1):
            one = _as_one(x, kernels, move)
            dx = _gradients(dy, one, True, False)[0].reshape(x.shape) if for_x else None
            if not for_kernels:
                return dx, None, None
            dy, x = (v.reshape(len(kernels), -1, *v.shape[2:]) for v in (dy, x))
            return dx, kernel_gradient(dy, x, kernels.shape[3:], move.padding, move.dilation), None
        dx, dW = _gradients(dy, _as_channels(x, kernels, move), for_x, True)
        if move.transposed:
            dW = dW.reshape(len(kernels), kernels.shape[2], *dW.shape[1:]).transpose(1, 2)
        return dx.reshape(x.shape) if for_x else None, dW.reshape(kernels.shape), None


def _gradients(dy: Tensor, one: tuple[Any, ...], for_x: bool, for_kernels: bool) -> tuple[Tensor, Tensor]:
    """Those of a convolution with the arguments `one`."""
    dy = dy.reshape(len(one[0]), -1, *dy.shape[2:])
    dx, dW, _ = torch.ops.aten.convolution_backward(dy, *one, [for_x, for_kernels, False])
    return dx, dW


def _as_one(x: Tensor, kernels: Tensor, move: Geometry) -> tuple[Any, ...]:
    """The arguments of one convolution: the batch's if all kernels are one seen N times, as `grouped.expand` makes."""
    if kernels.stride(0) == 0:
        return x, _layout(kernels[: move.groups], move), None, *_how(move), move.groups
    return _as_channels(x, kernels, move)


def _as_channels(x: Tensor, kernels: Tensor, move: Geometry) -> tuple[Any, ...]:
    """The arguments of one convolution: the images are groups of channels of one image."""
    return x.reshape(1, -1, *x.shape[2:]), _layout(kernels, move), None, *_how(move), len(kernels)


def _layout(kernels: Tensor, move: Geometry) -> Tensor:
    return (kernels.transpose(1, 2) if move.transposed else kernels).flatten(0, 1)


def _how(move: Geometry) -> tuple[Any, ...]:
    return move.stride, move.padding, move.dilation, move.transposed, move.output_padding
