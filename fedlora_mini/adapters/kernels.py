"""A convolution with one kernel per image, whose kernels' gradients are matrix products where they are thin.

y_i = W_i * x_i for every image i is one convolution with N times as many groups. Forward that costs what the shared
kernel costs; at stride 1, and transposed, the gradient of thin kernels costs two to three times as much. There it is a
correlation of two signals: shifted copies of one, times the other. The copies are made of the side with fewer channels,
on a thin path the r that leave it, not the c that enter; times the kernels, they are the gradient of x as well.
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


def thin_gradients(dy: Tensor, x: Tensor, kernels: Tensor, move: Geometry, for_x: bool) -> tuple[Tensor | None, Tensor]:
    """∂L/∂x_i, None if it is not asked for or not made of the same copies, and ∂L/∂W_i, for every image i.

    ∂L/∂W_i[o, c, u] = Σ_p dy_i[o, p] x_i[c, p + dilation u - padding] at stride 1, x zero outside its grid; transposed
    Σ_q dy_i[o, stride q + dilation u - padding] x_i[c, q] at any. Copies of dy hold all that ∂L/∂x_i reads, too.
    dy: (N, c_out, *P), x: (N, c, *Q), kernels: (N, c_out, c, *k).
    """
    size, stride, margin, step = kernels.shape[3:], move.stride, move.padding, move.dilation
    of_dy = move.transposed or dy[0].numel() <= x[0].numel()
    a, b = (dy, x) if of_dy else (x, dy)
    rows = max(1, SHIFTED // (a.shape[1] * math.prod(size) * b[0, 0].numel()))
    if rows < len(x):
        pieces = zip(dy.split(rows), x.split(rows), kernels.split(rows), strict=True)
        dxs, dWs = zip(*(thin_gradients(*piece, move, for_x) for piece in pieces), strict=True)
        return torch.cat(dxs) if of_dy and for_x else None, torch.cat(dWs)
    if not of_dy:
        copies = _shifts(x, size, margin, step, stride, dy.shape[2:])  # (N, c * prod(k), prod(P))
        return None, torch.bmm(dy.flatten(2), copies.mT).view(kernels.shape)
    turn: tuple[int, ...] = ()
    if not move.transposed:  # Σ_q x[q] dy[q + padding - dilation u]: the last shift comes first
        margin = [d * (k - 1) - p for d, k, p in zip(step, size, margin, strict=True)]
        turn = tuple(range(3, kernels.dim()))
    copies = _shifts(dy, size, margin, step, stride, x.shape[2:])  # (N, c_out * prod(k), prod(Q))
    dW = torch.bmm(x.flatten(2), copies.mT).view(len(x), x.shape[1], -1, *size).transpose(1, 2).flip(turn)
    if not for_x:
        return None, dW
    own = kernels[:1] if kernels.stride(0) == 0 else kernels
    W = own.flip(turn).transpose(1, 2).flatten(2)  # (N, c, c_out * prod(k))
    return torch.bmm(W.expand(len(x), -1, -1), copies).view(x.shape), dW


def _shifts(
    a: Tensor,
    size: Sequence[int],
    margin: Sequence[int],
    step: Sequence[int],
    stride: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    """a[i, c, stride p + step u - margin] for every u in `size` and p in `grid`: (N, c * prod(size), prod(grid))."""
    a = F.pad(a, [m for m in reversed(margin) for _ in (0, 1)]).contiguous()
    near, far = ([d * s for d, s in zip(by, a.stride()[2:], strict=True)] for by in (stride, step))
    shifts = a.as_strided((*a.shape[:2], *size, *grid), (*a.stride()[:2], *far, *near))
    return shifts.reshape(len(a), -1, math.prod(grid))


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
        """Thin kernels by shifted copies where that is faster, others as the grouped convolution that they are."""
        (x, kernels), move = ctx.saved_tensors, ctx.move
        for_x, for_kernels = ctx.needs_input_grad[:2]
        dx, dW = None, None
        thin = min(kernels.shape[1:3]) < THIN[x.dim() - 2]
        if for_kernels and thin and (move.transposed or math.prod(move.stride) == 1):
            own_dy, own_x = (v.reshape(len(kernels), -1, *v.shape[2:]) for v in (dy, x))
            dx, dW = thin_gradients(own_dy, own_x, kernels, move, for_x)
        elif for_kernels:
            dx, dW = _gradients(dy, _as_channels(x, kernels, move), for_x, True)
            if move.transposed:
                dW = dW.reshape(len(kernels), kernels.shape[2], *dW.shape[1:]).transpose(1, 2)
            dW = dW.reshape(kernels.shape)
        if for_x and dx is None:
            dx = _gradients(dy, _as_one(x, kernels, move), True, False)[0]
        return dx if dx is None else dx.reshape(x.shape), dW, None


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
