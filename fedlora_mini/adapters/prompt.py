"""[P; z] -> block -> drop P: trained tokens stand before a block's own, in every block anew (VPT-deep)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.ops import group_size
from fedlora_mini.errors import FedloraError


class Prompt(Adapter):
    """z -> block([P; z]) without its first p tokens; P: (p, d). Wraps a block (N, T, d) -> (N, T, d), not a layer.

    P ~ U(-a, a), a = sqrt(6 / (d + d)): VPT has 3 * patch² for one of the d, the same number for ViT-B/16. The start is
    NOT the base: attention is shared with the prompts from the first step on. Further arguments go to the block as they
    are, so a mask over tokens must count the prompts. p d numbers a block. Jia et al. 2022.
    """

    factors = ("P",)
    merges = False
    starts_at_base = False

    def __init__(self, base: nn.Module, tokens: int = 8, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        if tokens < 1:
            raise FedloraError(f"tokens must be at least 1, got {tokens}")
        d, like = width(base), next(base.parameters())
        P = (torch.rand(tokens, d, generator=generator or torch.default_generator) * 2 - 1) * math.sqrt(3 / d)
        self.tokens, self.P = tokens, nn.Parameter(P.to(like))

    @classmethod
    def check(cls, base: nn.Module) -> None:
        if hasattr(base, "window_size"):
            raise FedloraError(f"{type(base).__name__} cuts a map into windows: it has no place for further tokens")
        width(base)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        d = self.P.shape[-1]
        if x.dim() != 3 or x.shape[2] != d:
            raise FedloraError(f"prompts stand before tokens (N, T, {d}), got {tuple(x.shape)}")
        P = self.P.reshape(-1, 1, self.tokens, d)  # (G, 1, p, d)
        P = P.expand(-1, group_size(x, len(P)), -1, -1).reshape(-1, self.tokens, d)  # (N, p, d)
        return self.base(torch.cat([P, x], 1), *args, **kwargs)[:, self.tokens :]

    def config(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


def width(block: nn.Module) -> int:
    """d of a transformer block, from its first LayerNorm."""
    norm = next((module for module in block.modules() if isinstance(module, nn.LayerNorm)), None)
    if norm is None or len(norm.normalized_shape) != 1 or isinstance(block, nn.LayerNorm):
        raise FedloraError(f"{type(block).__name__} is no transformer block: prompts need one with a LayerNorm over d")
    return int(norm.normalized_shape[0])
