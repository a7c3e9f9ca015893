"""Δb = d: only the biases train (BitFit)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import NORMS, Adapter
from fedlora_mini.adapters.ops import LAYERS, channels, group_size
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


def spread(layer: Any, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """y in blocks, and v, one number a channel, with axes to broadcast against it; v may carry a group axis.

    `ops.channels`, for norms too: the numbers of a LayerNorm cover its last axes, those of any other norm axis 1.
    """
    own = layer.normalized_shape if isinstance(layer, nn.LayerNorm) else v.shape[-1:]
    m = math.prod(own)
    G = v.numel() // m
    group_size(y, G)
    if isinstance(layer, nn.LayerNorm):
        return y.reshape(G, -1, m), v.reshape(G, 1, m)
    return channels(layer, y, v.reshape(G, m))


class Bias(Adapter):
    """Δb = d, d: the bias' shape, zero at the start; ΔW = 0. For linear layers, convolutions and norms with a bias.

    m numbers a layer. Ben Zaken et al. 2022.
    """

    factors = ("d",)
    linear = True

    def __init__(self, base: nn.Module, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        self.d = nn.Parameter(torch.zeros_like(self.base.bias))

    @classmethod
    def check(cls, base: nn.Module) -> None:
        if not isinstance(base, (*LAYERS, *NORMS)):
            raise FedloraError(f"{type(base).__name__} is neither a linear layer, nor a convolution, nor a norm")
        if base.bias is None:
            raise FedloraError(f"this {type(base).__name__} has no bias: there is nothing to train")

    def delta(self) -> Tensor:
        lead = self.d.shape[: self.d.dim() - self.base.bias.dim()]
        return self.d.new_zeros(*lead, *self.base.weight.shape)

    def adapted(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows, d = spread(self.base, y, self.d)
        return (rows + d).reshape(y.shape)

    def folded(self) -> State:
        return {"bias": self.base.bias + self.d}

    def config(self) -> dict[str, Any]:
        return {}
