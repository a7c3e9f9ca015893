"""x <- F^-1(Ā_low + |F(x)|_high, angle F(x)): every image gets the federation's mean amplitude. HarmoFL, Jiang 2022.

In training and at test time alike. The public code's window holds the zero frequency alone (ratio 0): then only each
channel's mean is exchanged. Here the window is that of chapter 12.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.data.spectral import low_frequency_swap
from fedlora_mini.regularizers.base import Regularizer


@dataclass(frozen=True)
class Harmonised(Regularizer):
    """Reads the note `~amplitude` (C, H, W), the mean over clients; without it (the first round) x stays."""

    ratio: float = 0.05

    reads = ("~amplitude",)

    def __post_init__(self) -> None:
        ranges(self, ratio="[0, 0.5]")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"mean amplitude, window {self.ratio:g}"

    def images(self, x: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        common = kept.get("~amplitude")
        return x if common is None else low_frequency_swap(x, common.to(x), self.ratio).clamp(0, 1)
