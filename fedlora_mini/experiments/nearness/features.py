"""What each layer that LoRA adapts is given at every site: `inputs`, the rows that its weight matrix (m, n) meets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.adapters.base import matching, region
from fedlora_mini.adapters.ops import CONV, TRANSPOSED, matrix_shape
from fedlora_mini.chance import seeded
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError

IMAGES, PLACES, CHUNK = 96, 24, 16  # of a site, of an image, at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """A layer's inputs at some places of some images: x (N, P, n), and the class there, y (N, P)."""

    x: Tensor
    y: Tensor

    def of(self, images: Tensor) -> "Rows":
        return Rows(self.x[images], self.y[images])


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """path -> layer, for every layer of encoder and decoder that row "lora" adapts, in the network's order."""
    return dict(matching(model, lambda path, module: region(model, path) != "head"))


@torch.no_grad()
def inputs(
    model: nn.Module, split: Split, images: int = IMAGES, places: int = PLACES, seed: int = 0
) -> dict[str, Rows]:
    """path -> `Rows` of the frozen `model` on at most so many images of `split`.

    Images and places are drawn by (seed, path) alone: two splits of equal length are seen at the same places.
    """
    layers, seen = adapted_layers(model), dict[str, list[Rows]]()
    order = torch.randperm(len(split), generator=seeded(f"nearness images:{seed}"))[:images].sort().values
    labels = split.masks[:0]

    def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        rng = seeded(f"nearness places:{seed}:{path}")

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            (H, W), N = labels.shape[1:], len(labels)
            x, (h, w) = columns(layer, args[0], (H, W))  # (N, G, n, h w)
            place, group = (torch.randint(x.shape[axis], (N, places), generator=rng) for axis in (3, 1))
            i, j, image = place.div(w, rounding_mode="floor"), place % w, torch.arange(N)[:, None]
            y = labels[image, (2 * i + 1) * H // (2 * h), (2 * j + 1) * W // (2 * w)]  # the pixel in the middle
            seen.setdefault(path, []).append(Rows(x[image, group, :, place], y))

        return hook

    handles = [layer.register_forward_pre_hook(look(path)) for path, layer in layers.items()]
    try:
        for rows in order.split(CHUNK):
            labels = split.masks[rows]
            model(split.images[rows])
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])) for path, parts in seen.items()
    }


def columns(layer: Any, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """(N, G, n, h w) and (h, w): the n inputs of one output, at every place, for each of G groups of channels.

    Tokens (N, T, n) stand for a grid over the image of `size`. One output of a transposed convolution sees every
    channel at one place (if its stride is its kernel), so there n is the number of channels of a group.
    """
    if isinstance(layer, nn.Linear) and x.dim() == 3:
        step = (size[0] * size[1] / x.shape[1]) ** 0.5
        return x.mT[:, None], (round(size[0] / step), round(size[1] / step))
    if isinstance(layer, TRANSPOSED) and x.dim() == 4:
        patches, n, (h, w) = x.flatten(2), x.shape[1] // layer.groups, (x.shape[2], x.shape[3])
    elif isinstance(layer, CONV) and x.dim() == 4 and layer.padding_mode == "zeros":
        n = matrix_shape(layer)[1]
        conv: Any = layer
        patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (N, G n, h w)
        sides = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        h, w = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, p, d, k, s in sides)
    else:
        raise FedloraError(
            f"{type(layer).__name__} with input {tuple(x.shape)}: only tokens (N, T, n) and 2D images (N, C, H, W) are "
            "taken apart, and no padding but zeros"
        )
    return patches.unflatten(1, (-1, n)), (h, w)
