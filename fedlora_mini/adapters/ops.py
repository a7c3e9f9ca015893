"""A layer's own operation with another weight, or with one weight per group of the batch.

`operate(layer, x, W)` equals `functional_call(layer, {"weight": W, "bias": 0}, x)`. With a leading group axis,
W: (G, *weight.shape), the batch is G blocks of equal size and block g sees W[g]. Any inner batch (the windows of a
Swin block) must vary faster than the sample: then `x.reshape(G, -1, n)` folds it back into its sample.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.adapters.kernels import Geometry, PerImage
from fedlora_mini.errors import FedloraError

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONV, *TRANSPOSED)

_conv: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_conv_transpose: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def matrix_shape(layer: Any) -> tuple[int, int]:
    """(m, n) of the layer's weight as a matrix: m outputs, n = inputs per output = c_in / groups * kernel volume."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, (*CONV, *TRANSPOSED)):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    raise FedloraError(
        f"no low-rank form for {type(layer).__name__}; accepted: {', '.join(t.__name__ for t in LAYERS)}"
    )


def to_weight(layer: Any, M: Tensor) -> Tensor:
    """(…, m, n) matrix -> (…, *weight.shape). Transposed convolutions keep their (c_in, m/g, k) layout."""
    lead = M.shape[:-2]
    if isinstance(layer, nn.Linear):
        return M
    g, k = layer.groups, tuple(layer.kernel_size)
    c_in, m = layer.in_channels, layer.out_channels
    if isinstance(layer, CONV):
        return M.reshape(*lead, m, c_in // g, *k)
    W = M.reshape(*lead, g, m // g, c_in // g, *k).transpose(len(lead) + 1, len(lead) + 2)  # (…, g, c_in/g, m/g, k)
    return W.reshape(*lead, c_in, m // g, *k)


def to_matrix(layer: Any, W: Tensor) -> Tensor:
    """(…, *weight.shape) -> (…, m, n): the inverse of `to_weight`."""
    m, n = matrix_shape(layer)
    lead = W.shape[: W.dim() - layer.weight.dim()]
    if not isinstance(layer, TRANSPOSED):
        return W.reshape(*lead, m, n)
    g, k = layer.groups, tuple(layer.kernel_size)
    W = W.reshape(*lead, g, layer.in_channels // g, m // g, *k).transpose(len(lead) + 1, len(lead) + 2)
    return W.reshape(*lead, m, n)


def group_size(x: Tensor, groups: int) -> int:
    """Rows of `x` per group; the batch must divide evenly."""
    if x.shape[0] % groups:
        raise FedloraError(f"a batch of {x.shape[0]} does not split into {groups} equal groups")
    return x.shape[0] // groups


def linear(x: Tensor, W: Tensor) -> Tensor:
    """x (N, …, n) times W (m, n) or (G, m, n) -> (N, …, m)."""
    if W.dim() == 2:
        return F.linear(x, W)
    G = W.shape[0]
    group_size(x, G)
    y = torch.bmm(x.reshape(G, -1, x.shape[-1]), W.transpose(1, 2))  # (G, N/G*…, m)
    return y.reshape(*x.shape[:-1], W.shape[1])


def convolve(layer: Any, x: Tensor, kernels: Tensor, groups: int) -> Tensor:
    """The layer's stride, padding, dilation, padding_mode (and output_padding) with other kernels.

    x: (b, groups*c, *S); kernels: (groups, c_out, c, *k), in conv layout for transposed layers too.
    Returns (b, groups*c_out, *S').
    """
    dims = x.dim() - 2
    if isinstance(layer, TRANSPOSED):
        W = kernels.transpose(1, 2).reshape(x.shape[1], kernels.shape[1], *kernels.shape[3:])  # (groups*c, c_out, k)
        padding, out = layer.padding, layer.output_padding
        return _conv_transpose[dims](x, W, None, layer.stride, padding, out, groups, layer.dilation)
    W = kernels.reshape(-1, *kernels.shape[2:])  # (groups*c_out, c, k)
    if layer.padding_mode == "zeros":
        return _conv[dims](x, W, None, layer.stride, layer.padding, layer.dilation, groups)
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return _conv[dims](padded, W, None, layer.stride, 0, layer.dilation, groups)


def is_pointwise(layer: Any) -> bool:
    """Whether the layer is a matrix at every voxel: a convolution of size 1 that moves and pads nothing."""
    return (
        isinstance(layer, CONV)
        and layer.groups == math.prod(layer.kernel_size) == math.prod(layer.stride) == 1
        and (isinstance(layer.padding, str) or not any(layer.padding))
    )


def pointwise(x: Tensor, W: Tensor) -> Tensor:
    """x (N, g*n, *S) times W (G, g, m, n), the same at every voxel -> (N, g*m, *S); g are the groups of channels.

    A matmul, which unlike a convolution copies no layout: channels-last stays channels-last.
    """
    G, g, m, n = W.shape
    if G == g == 1 and x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return F.linear(x.movedim(1, -1), W[0, 0]).movedim(-1, 1)
    y = W.unsqueeze(1) @ x.reshape(G, group_size(x, G), g, n, -1)  # (G, N/G, g, m, voxels)
    return y.reshape(x.shape[0], g * m, *x.shape[2:])


def convolve_each(layer: Any, x: Tensor, kernels: Tensor) -> Tensor:
    """`convolve` with kernels (N*g, c_out, c, *k): image i of N sees the i-th g of them. -> (N, g*c_out, *S')."""
    padding, turned = layer.padding, isinstance(layer, TRANSPOSED)
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * (x.dim() - 2)
    if torch.is_autocast_enabled(x.device.type):  # which looks into no operation of ours
        x, kernels = (each.to(torch.get_autocast_dtype(x.device.type)) for each in (x, kernels))
    move = Geometry(layer.stride, padding, layer.dilation, layer.output_padding, turned, layer.groups)
    return PerImage.apply(x, kernels, move)


def convolve_grouped(layer: Any, x: Tensor, kernels: Tensor, G: int) -> Tensor:
    """`convolve` with kernels (G*g, c_out, c, *k): block i of the batch sees the i-th g of them. -> (N, g*c_out, *S').

    One sample a block (per-sample gradients): one call of `kernels.PerImage`. More of them (clients): a call a block,
    since samples beside channels would have to be copied there and back.
    """
    g = layer.groups
    if G == 1:
        return convolve(layer, x, kernels, g)
    if group_size(x, G) > 1:
        blocks = zip(x.chunk(G), kernels.chunk(G), strict=True)
        return torch.cat([convolve(layer, part, own, g) for part, own in blocks])
    return convolve_each(layer, x, kernels)


def operate(layer: Any, x: Tensor, W: Tensor) -> Tensor:
    """The layer's operation, without bias, with weight W: weight.shape or (G, *weight.shape)."""
    if isinstance(layer, nn.Linear):
        return linear(x, W)
    m, n = matrix_shape(layer)
    M = to_matrix(layer, W).reshape(-1, m, n)  # (G, m, n)
    G, g = M.shape[0], layer.groups
    if is_pointwise(layer):
        return pointwise(x, M.unsqueeze(1))
    kernels = M.reshape(G * g, m // g, layer.in_channels // g, *layer.kernel_size)
    return convolve_grouped(layer, x, kernels, G)


def channels(layer: Any, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """y by group, output channel and voxel, and d: (m,) or (G, m) with axes to broadcast against it."""
    d = d.reshape(-1, d.shape[-1])  # (G, m)
    G, m = d.shape
    group_size(y, G)
    if isinstance(layer, nn.Linear):
        return y.reshape(G, -1, m), d.reshape(G, 1, m)
    return y.reshape(G, -1, m, y[0, 0].numel()), d.reshape(G, 1, m, 1)


def add_bias(layer: Any, y: Tensor, d: Tensor) -> Tensor:
    """y + d along the output channels; d: (m,) or (G, m)."""
    rows, spread = channels(layer, y, d)
    return (rows + spread).reshape(y.shape)


def rescale(layer: Any, y: Tensor, c: Tensor) -> Tensor:
    """c y along the output channels; c: (m,) or (G, m)."""
    rows, spread = channels(layer, y, c)
    return (rows * spread).reshape(y.shape)


def down(layer: Any, x: Tensor, A: Tensor) -> Tensor:
    """x -> A x, the thin features. A: (r, n) or (G, r, n). Linear: (N, …, r); convolution: (N, g*r, *S').

    A convolution is one with r outputs, its kernel lives in A; the g groups of channels share it.
    """
    if isinstance(layer, nn.Linear):
        return linear(x, A)
    A = A.reshape(-1, *A.shape[-2:])  # (G, r, n)
    (G, r, _), g = A.shape, layer.groups
    if is_pointwise(layer):
        return pointwise(x, A.unsqueeze(1))
    kernels = A.reshape(G, 1, r, layer.in_channels // g, *layer.kernel_size)
    kernels = kernels.expand(G, g, *kernels.shape[2:]).reshape(G * g, *kernels.shape[2:])  # (G*g, r, c_in/g, *k)
    return convolve_grouped(layer, x, kernels, G)


def up(layer: Any, h: Tensor, B: Tensor) -> Tensor:
    """Thin features h of `down` -> B h, the layer's outputs. B: (m, r) or (G, m, r). Pointwise for a convolution."""
    if isinstance(layer, nn.Linear):
        return linear(h, B)
    B = B.reshape(-1, *B.shape[-2:])  # (G, m, r)
    G, m, r = B.shape
    return pointwise(h, B.reshape(G, layer.groups, m // layer.groups, r))


def is_thin(layer: Any, rank: int) -> bool:
    """Whether A, then B cost fewer multiplications than BA: a voxel takes r n in each of g groups and m r, or m n.

    A depthwise convolution is never thin: g = m.
    """
    m, n = matrix_shape(layer)
    return rank * (getattr(layer, "groups", 1) * n + m) < m * n


def lowrank(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """x -> (BA) x. A: (r, n), B: (m, r), or (G, r, n) and (G, m, r). BA is formed where the layer is not thin."""
    if is_thin(layer, A.shape[-2]):
        return up(layer, down(layer, x, A), B)
    return operate(layer, x, to_weight(layer, B @ A))
