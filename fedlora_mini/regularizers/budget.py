"""b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))³: a number of directions that all layers share."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.scope import clock, layers
from fedlora_mini.state import State


def cubic(t: int, T: int, t_i: int, t_f: int, b_0: int, b_T: int) -> int:
    """b(t), rounded down: b_0 until t_i, b_T in the last t_f steps."""
    if t <= t_i:
        return b_0
    if t >= T - t_f:
        return b_T
    return int(b_T + (b_0 - b_T) * (1 - (t - t_i) / (T - t_i - t_f)) ** 3)


@dataclass
class _Sensitivity:
    """Ī and Ū of every element, and the mask once it is frozen. The averages start at zero."""

    mean: State = field(default_factory=dict)
    deviation: State = field(default_factory=dict)
    frozen: State | None = None

    def update(self, name: str, I: Tensor, beta1: float, beta2: float) -> None:
        zero = torch.zeros_like(I)
        self.mean[name] = beta1 * self.mean.get(name, zero) + (1 - beta1) * I
        distance = (I - self.mean[name]).abs()
        self.deviation[name] = beta2 * self.deviation.get(name, zero) + (1 - beta2) * distance

    def score(self, name: str) -> Tensor:
        return self.mean[name] * self.deviation[name]

    def directions(self, path: str) -> Tensor:
        """score(v_i) + mean over column i of B + mean over row i of A: (r,). What stands still counts nothing."""
        total = self.score(f"{path}.v")
        for factor, axis in (("B", 0), ("A", 1)):
            if f"{path}.{factor}" in self.mean:
                total = total + self.score(f"{path}.{factor}").mean(axis)
        return total

    def mask(self, paths: list[str], b: int, gone: State) -> State:
        """True for the b directions with the highest scores over all layers, by their v's name; `gone` come last."""
        scores = [self.directions(path) for path in paths]
        scores = [s.masked_fill(gone[path], -1.0) if path in gone else s for path, s in zip(paths, scores, strict=True)]
        best = torch.cat(scores).argsort(descending=True, stable=True)[:b]
        kept = torch.zeros(sum(len(s) for s in scores), dtype=torch.bool, device=best.device)
        kept[best] = True
        parts = kept.split([len(s) for s in scores])
        return {f"{path}.v": part for path, part in zip(paths, parts, strict=True)}


@dataclass(frozen=True)
class RankBudget(Regularizer):
    """AdaLoRA's allocation: v_i = 0 outside the b(t) most important directions of all layers together.

    For layers ΔW = s B diag(v) A (the paper's P = B, Λ = v, Q = A). An element's importance is I = |w dL/dw|; with
    Ī <- beta1 Ī + (1 - beta1) I and Ū <- beta2 Ū + (1 - beta2) |I - Ī| its score is Ī Ū. Every `every` steps the mask
    is drawn anew; in between a masked v_i trains on and may return. In the last t_f steps the mask is frozen.

    `final` and `start` are mean ranks per layer: b_T = round(final * layers), b_0 likewise (None: all that there are).
    `warm` = t_i / T and `cool` = t_f / T are shares, ours to make the schedule fit any T. T is the steps of a round, or
    `total` steps counted through the rounds. The averages start anew in each round; in a round that begins with
    the mask frozen, v_i = 0 stays 0. Clients choose for themselves, so the mean of their v may keep more than b(t)
    directions. Zhang et al. 2023; chapter 6.
    """

    final: float
    start: float | None = None
    warm: float = 0.1
    cool: float = 0.3
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    total: int | None = None

    def __post_init__(self) -> None:
        if self.final <= 0 or (self.start is not None and self.start < self.final):
            raise FedloraError(f"mean ranks need 0 < final <= start, got final {self.final}, start {self.start}")
        if min(self.warm, self.cool) < 0 or self.warm + self.cool >= 1:
            raise FedloraError(f"warm and cool are shares with a sum below 1, got {self.warm} and {self.cool}")
        if self.every < 1:
            raise FedloraError(f"every must be at least 1, got {self.every}")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"rank budget, mean rank {self.final:g}"

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        own = context.memory.setdefault("budget", _Sensitivity())
        if own.frozen is None:
            for path in layers(context, self.label, Diagonal):
                for name in (f"{path}.{factor}" for factor in Diagonal.factors):
                    if name in gradient:
                        own.update(name, (state[name] * gradient[name]).abs(), self.beta1, self.beta2)

    def prox_(self, state: State, context: Context) -> None:
        moves, own = context.moves, context.memory.get("budget", _Sensitivity())
        paths = [path for path in layers(context, self.label, Diagonal) if f"{path}.v" in own.mean]
        t, T = clock(context, self.total)
        t_i, t_f = round(self.warm * T), round(self.cool * T)
        last = t >= T - t_f
        if not paths or (not last and (t <= t_i or t % self.every)):
            return
        ranks = [len(state[f"{path}.v"]) for path in paths]
        b_0 = sum(ranks) if self.start is None else round(self.start * len(paths))
        b_T = max(1, round(self.final * len(paths)))
        began, _ = clock(replace(context, step=0), self.total)
        gone = {path: context.start[f"{path}.v"] == 0 for path in paths if 0 < T - t_f <= began}
        kept = own.frozen or own.mask(paths, cubic(t, T, t_i, t_f, b_0, b_T), gone)
        if last:
            own.frozen = kept
        for name, mask in kept.items():
            if name in moves:
                state[name].masked_fill_(~mask, 0.0)
