"""h + W_up φ(W_dn h + b_dn) + b_up: a thin network after a sub-layer (Houlsby) or beside it (AdaptFormer)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.adapters.ops import add_bias, down, linear, matrix_shape, pointwise, up
from fedlora_mini.adapters.places import role
from fedlora_mini.errors import FedloraError


class Bottleneck(Adapter):
    """The four tensors. W_dn: (r, n) Kaiming-uniform, W_up: (m, r) zero, both biases zero: the base to the bit.

    Not linear in its input, so it cannot be folded into the base.
    """

    factors = ("W_dn", "b_dn", "W_up", "b_up")
    merges = False

    def __init__(self, base: nn.Module, rank: int, width: int, generator: torch.Generator | None) -> None:
        super().__init__(base)
        if rank < 1:
            raise FedloraError(f"rank must be at least 1, got {rank}")
        (m, _), W = matrix_shape(base), self.base.weight
        self.rank = rank
        self.W_dn = self.first(width, generator)
        self.b_dn = nn.Parameter(W.new_zeros(rank))
        self.W_up = nn.Parameter(W.new_zeros(m, rank))
        self.b_up = nn.Parameter(W.new_zeros(m))

    def first(self, width: int, generator: torch.Generator | None) -> nn.Parameter:
        """A W_dn that reads `width` numbers."""
        W = kaiming_uniform((self.rank, width), generator or torch.default_generator)
        return nn.Parameter(W.to(self.base.weight))


class Houlsby(Bottleneck):
    """y = W x + b, then y + W_up GELU(W_dn y + b_dn) + b_up: after the sub-layer, before the skip connection.

    2 r m + r + m numbers, m the layer's outputs. On a convolution both maps are pointwise on the output channels.
    Houlsby et al. 2019 leave φ open (GELU is ours) and start near the identity; with W_up = 0 it is the identity.
    """

    def __init__(self, base: nn.Module, rank: int = 8, generator: torch.Generator | None = None) -> None:
        super().__init__(base, rank, matrix_shape(base)[0], generator)

    def across(self, y: Tensor, W: Tensor) -> Tensor:
        """W y over the channels, the same at every token or voxel."""
        if isinstance(self.base, nn.Linear):
            return linear(y, W)
        return pointwise(y, W.reshape(-1, 1, *W.shape[-2:]))

    def adapted(self, x: Tensor) -> Tensor:
        y = self.base(x)
        h = F.gelu(add_bias(self.base, self.across(y, self.W_dn), self.b_dn))  # (N, …, r) or (N, r, *S')
        return y + add_bias(self.base, self.across(h, self.W_up), self.b_up)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank}


class AdaptFormer(Bottleneck):
    """MLP(x') + s (W_up ReLU(W_dn x' + b_dn) + b_up), x' the input of the MLP whose last layer this is; s = `scale`.

    In a model the adapter hears x' at the MLP's first layer, which `attach` finds; `source` is then the width of x',
    and W_dn is drawn anew for it. With source=None x' is the layer's own input: for a layer alone, and for a
    convolution, which has no MLP around it. There W_dn holds the kernel and W_up is pointwise: a LoRA with biases and a
    ReLU between its factors. r (n + m) + r + m numbers, n = `source` or the layer's inputs. Chen et al. 2022.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        scale: float = 0.1,
        source: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if source is not None and not isinstance(base, nn.Linear):
            raise FedloraError(f"a {type(base).__name__} ends no MLP: source must be None, got {source}")
        super().__init__(base, rank, source or matrix_shape(base)[1], generator)
        self.scale, self.source = scale, source
        self._generator = generator
        self._heard: Tensor | None = None  # x', between the MLP's first layer and its last

    def attach(self, model: nn.Module, path: str) -> None:
        first = mlp_input(model, path) if role(path, self.base) == "mlp output" else None
        if first is None and self.source is not None:
            raise FedloraError(f"beside '{path}' there is no MLP input layer for AdaptFormer to listen to")
        if first is None:
            return
        if self.source is None:
            self.source, self.W_dn = first.in_features, self.first(first.in_features, self._generator)
        if self.source != first.in_features:
            raise FedloraError(f"the MLP of '{path}' reads {first.in_features} numbers, its AdaptFormer {self.source}")
        first.register_forward_pre_hook(self.hear)  # a bound method: in a deep copy it is the copy's own

    def hear(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep x' until `path` takes it."""
        self._heard = inputs[0]

    def path(self, x: Tensor) -> Tensor:
        if self.source is not None:
            if self._heard is None:
                raise FedloraError("AdaptFormer heard no input: the MLP's first layer was not called before its last")
            x, self._heard = self._heard, None
        groups = getattr(self.base, "groups", 1)  # of a convolution; they share W_dn and b_dn
        h = add_bias(self.base, down(self.base, x, self.W_dn), torch.cat([self.b_dn] * groups, -1))
        return self.scale * add_bias(self.base, up(self.base, F.relu(h), self.W_up), self.b_up)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "source": self.source}


def mlp_input(model: nn.Module, path: str) -> nn.Linear | None:
    """The MLP's first layer beside the last one at `path`: the bare layer, also where an adapter is around it."""
    parent, _, _ = path.rpartition(".")
    for name, module in model.get_submodule(parent).named_children():
        layer = module.base if isinstance(module, Adapter) else module
        if isinstance(layer, nn.Linear) and role(name, layer) == "mlp input":
            return layer
    return None
