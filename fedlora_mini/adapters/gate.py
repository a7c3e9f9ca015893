"""l ⊙ y or W (l ⊙ x): a number per channel that inhibits or amplifies activations, (IA)³."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.bias import spread
from fedlora_mini.adapters.ops import matrix_shape, to_matrix, to_weight
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.state import State

SIDES = ("in", "out", "kv")


def scaled(layer: Any, y: Tensor, l: Tensor) -> Tensor:
    """l y over the channels; l: (c,) or (G, c)."""
    rows, l = spread(layer, y, l)
    return (rows * l).reshape(y.shape)


class IA3(Adapter):
    """side "in": W (l ⊙ x) + b; "out": l ⊙ (W x + b); "kv": the same on the last two thirds of a fused q, k, v.

    l starts at 1, so W = diag(l) W_0 or W_0 diag(l): a scaling of rows or columns. In a transformer "kv" gives l_k ⊙ K
    and l_v ⊙ V (l = l_k, l_v: 2/3 m numbers), and "in" at the MLP's last layer gives l_ff ⊙ φ(W_1 x). On a
    convolution "in" is a number per input channel. c_in or m numbers. Liu et al. 2022.
    """

    factors = ("l",)
    linear = True  # affine: the mean of l gives the mean of ΔW

    def __init__(self, base: nn.Module, side: str = "in", generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        if side not in SIDES:
            raise unknown("side", side, SIDES)
        m, _ = matrix_shape(base)
        fused = isinstance(base, nn.Linear) and m % 3 == 0
        if side == "kv" and not fused:
            raise FedloraError(f"side 'kv' is for a linear layer with q, k and v in its outputs, not for {base}")
        c = self.base.in_features if isinstance(base, nn.Linear) else self.base.in_channels
        self.side = side
        self.l = nn.Parameter(self.base.weight.new_ones({"in": c, "out": m, "kv": m - m // 3}[side]))

    def outputs(self) -> Tensor:
        """A number for every output: (m,) or (G, m); q has 1."""
        if self.side == "out":
            return self.l
        return torch.cat([torch.ones_like(self.l[..., : self.l.shape[-1] // 2]), self.l], -1)

    def adapted(self, x: Tensor) -> Tensor:
        if self.side == "in":
            return self.base(scaled(self.base, x, self.l))
        return scaled(self.base, self.base(x), self.outputs())

    def weight(self) -> Tensor:
        """diag(l) W_0 or W_0 diag(l) in `base.weight`'s shape, with the group axis in front."""
        M, g = to_matrix(self.base, self.frozen()), getattr(self.base, "groups", 1)
        m, n = M.shape
        lead = self.l.shape[:-1]
        if self.side != "in":
            return to_weight(self.base, self.outputs().unsqueeze(-1) * M)
        l = self.l.reshape(*lead, g, 1, -1, 1)
        return to_weight(self.base, (l * M.reshape(g, m // g, l.shape[-2], -1)).reshape(*lead, m, n))

    def delta(self) -> Tensor:
        return self.weight() - self.frozen()

    def folded(self) -> State:
        bias = {} if self.side == "in" or self.base.bias is None else {"bias": self.outputs() * self.base.bias}
        return {"weight": self.weight()} | bias

    def config(self) -> dict[str, Any]:
        return {"side": self.side}
