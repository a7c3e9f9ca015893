"""ΔW = D: a full-rank update beside a frozen layer, with a group axis like the rest. Task heads train this way."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.ops import add_bias, operate
from fedlora_mini.state import State


class Dense(Adapter):
    """ΔW = D, Δb = d, both zero at the start. D: weight.shape, d: (m,), or with a leading group axis.

    The frozen bias stays in `base`; a layer without bias gets none.
    """

    factors: tuple[str, ...] = ("D", "d")
    linear = True

    def __init__(self, base: nn.Module, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        self.D = nn.Parameter(torch.zeros_like(self.base.weight))
        self.d = None if self.base.bias is None else nn.Parameter(torch.zeros_like(self.base.bias))

    def delta(self) -> Tensor:
        return self.D

    def path(self, x: Tensor) -> Tensor:
        y = operate(self.base, x, self.D)
        return y if self.d is None else add_bias(self.base, y, self.d)

    def folded(self) -> State:
        return super().folded() | ({} if self.d is None else {"bias": self.base.bias + self.d})

    def config(self) -> dict[str, Any]:
        return {}
