"""W_0 + ε, ε_ij ~ N(0, (rho f_t ||W'_i|| / sqrt(n))²): a step at a random point near W', so that minima are flat."""

import math
from dataclasses import dataclass, field

import torch

from fedlora_mini.adapters.base import delta_of
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import to_matrix, to_weight
from fedlora_mini.chance import seeded
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.scope import clock, layers
from fedlora_mini.state import State


@dataclass(frozen=True)
class FlatNoise(Regularizer):
    """Flat-LoRA: every step runs on W_0 + ε in place of W_0, then A and B move; W_0 itself never changes.

    W' = W_0 + s B A is (m, n) and W'_i its row i, so a row's noise has the length rho f_t ||W'_i|| in the mean square;
    f_t = (1 - cos(pi t / T)) / 2 grows from 0 to 1. T is the steps of a round, or `total` steps counted through the
    rounds. ε is a constant in the gradient. Nothing is stored: it is drawn again from (seed, round, step, path), the
    same for all clients. Li et al. 2025; chapter 4.
    """

    rho: float = 0.05
    total: int | None = None
    seed: int = 0
    grouped: bool = field(default=False, init=False)  # a frozen weight has no group axis

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise FedloraError(f"rho must not be negative, got {self.rho}")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"flat noise, rho {self.rho:g}"

    @torch.no_grad()
    def view(self, state: State, context: Context) -> State:
        t, T = clock(context, self.total)
        f = (1 - math.cos(math.pi * t / T)) / 2
        out = {}
        for path, layer in layers(context, self.label, LoRA, Diagonal).items():
            W = state.get(f"{path}.base.weight", layer.base.weight)  # where a federation has folded into it
            factors = {name: state[f"{path}.{name}"] for name in layer.factors}
            lengths = to_matrix(layer.base, W + delta_of(layer, factors)).norm(dim=1, keepdim=True)  # (m, 1)
            rng = seeded(f"flat:{self.seed}:{context.round}:{context.step}:{path}")
            m, n = to_matrix(layer.base, W).shape
            z = torch.randn(m, n, generator=rng, dtype=W.dtype).to(W.device)
            out[f"{path}.base.weight"] = W + to_weight(layer.base, self.rho * f * lengths / math.sqrt(n) * z)
        return out
