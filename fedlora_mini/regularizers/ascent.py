"""g <- ∇L(w + α g / ||g||): the gradient at the worst near point, for a flat minimum. HarmoFL, Jiang et al. 2022.

One ascent step of length α (0.05 in the paper) over everything that moves, then the optimiser's step with the gradient
from there. Two forward and backward passes a step. Foret et al. 2021 call it sharpness-aware.
"""

from dataclasses import dataclass

import torch

from fedlora_mini import state as S
from fedlora_mini.accepted import ranges
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State


@dataclass(frozen=True)
class Ascent(Regularizer):
    """w keeps its bits, and norms their statistics: the ascent is undone by copying back."""

    alpha: float = 0.05

    grouped = False

    def __post_init__(self) -> None:
        ranges(self, alpha="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"gradient after an ascent of {self.alpha:g}"

    @torch.no_grad()
    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        length = S.norm(gradient)
        if length == 0:
            return
        before = S.clone(state)
        for name, g in gradient.items():
            state[name].add_(g, alpha=self.alpha / length)
        gradient.update(S.pick(context.again(), gradient.__contains__))
        for name, value in before.items():
            state[name].copy_(value)
