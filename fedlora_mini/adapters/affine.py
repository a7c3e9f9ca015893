"""γ = γ_0 + Δγ, β = β_0 + Δβ: the affine map of a norm trains, its normalisation stays."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora_mini.adapters.base import NORMS, Adapter
from fedlora_mini.adapters.bias import spread
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


class Affine(Adapter):
    """y = x̂ ⊙ (γ_0 + Δγ) + β_0 + Δβ, x̂ the normalised input; Δγ, Δβ: the norm's own shape, zero at the start.

    A norm without γ or β counts as γ_0 = 1, β_0 = 0; then there is nothing to fold into, and it does not merge.
    BatchNorm: x̂ by the stored statistics. In training mode x̂ is by the batch, and the running statistics move as they
    do in the norm; a group axis is refused there, since the groups would see one another. 2 m numbers a norm.
    """

    factors = ("dgamma", "dbeta")
    linear = True

    def __init__(self, base: nn.Module, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        self.merges = self.base.weight is not None and self.base.bias is not None
        self.shape = shape(self.base)
        self.dgamma, self.dbeta = (nn.Parameter(torch.zeros(self.shape)) for _ in self.factors)
        if (own := self.own()) is not None:
            self.to(own)

    @classmethod
    def check(cls, base: nn.Module) -> None:
        if not isinstance(base, NORMS):
            raise FedloraError(f"{type(base).__name__} is no norm; accepted: LayerNorm, Group-, Instance-, BatchNorm")

    def own(self) -> Tensor | None:
        """A tensor of the norm that says which dtype and device it has; a norm may have none."""
        return self.base.weight if self.base.weight is not None else getattr(self.base, "running_mean", None)

    def attach(self, model: nn.Module, path: str) -> None:
        """A norm without tensors has the dtype and device of the network around it."""
        like = next((p for p in model.parameters() if p is not self.dgamma and p is not self.dbeta), None)
        if self.own() is None and like is not None:
            self.to(like)

    def delta(self) -> Tensor:
        return self.dgamma

    def folded(self) -> State:
        """γ and β, from 1 and 0 where the norm has none of its own."""
        gamma = 1 if self.base.weight is None else self.base.weight
        beta = 0 if self.base.bias is None else self.base.bias
        return {"weight": gamma + self.dgamma, "bias": beta + self.dbeta}

    def adapted(self, x: Tensor) -> Tensor:
        """Without a group axis in the norm's own operation, as far as it has γ and β; with one, x̂ first."""
        after = self.folded()
        has = {name: p for name in after if (p := getattr(self.base, name)) is not None}
        if max(self.dgamma.dim(), self.dbeta.dim()) == len(self.shape):
            inside = {name: after.pop(name) for name in has}
        else:
            self._refuse_batch_statistics()
            inside = {name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in has.items()}
        y = functional_call(self.base, inside, (x,))
        if "weight" in after:
            rows, gamma = spread(self.base, y, after["weight"])
            y = (rows * gamma).reshape(y.shape)
        if "bias" in after:
            rows, beta = spread(self.base, y, after["bias"])
            y = (rows + beta).reshape(y.shape)
        return y

    def _refuse_batch_statistics(self) -> None:
        norm = self.base
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and (norm.training or not norm.track_running_stats):
            raise FedloraError(f"{type(norm).__name__} mixes the groups by its batch statistics; call eval first")

    def config(self) -> dict[str, Any]:
        return {}


def shape(norm: Any) -> tuple[int, ...]:
    """Of γ and β, also where the norm has none."""
    if isinstance(norm, nn.LayerNorm):
        return tuple(norm.normalized_shape)
    return (norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features,)
