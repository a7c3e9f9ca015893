"""LoRA that also says how strong each of its inputs was: what PRILoRA prunes A by."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.lora import LoRA


class PRILoRA(LoRA):
    """ΔW = s B A, and `seen`: the norm ||x_j|| of every input over the last batch that was trained on.

    seen: (n,) in the order of A's columns, or (G, n) with a group axis. A convolution's input is a channel, the same
    for all offsets of the kernel. The rank by depth is `ranks.by_depth`, the masks are `regularizers.InputMask`.
    Benedek and Wolf 2024.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha, generator=generator)
        self.seen: Tensor | None = None

    def path(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen = self._input_norms(x.detach())
        return super().path(x)

    def _input_norms(self, x: Tensor) -> Tensor:
        lead = self.A.shape[:-2]  # () or (G,)
        if isinstance(self.base, nn.Linear):
            return x.reshape(*lead, -1, x.shape[-1]).norm(dim=-2)
        g, volume = self.base.groups, self.base.weight[0, 0].numel()
        rows = x.reshape(*(lead or (1,)), -1, g, x.shape[1] // g, x[0, 0].numel())  # (G, N/G, g, c, voxels)
        norms = rows.square().sum((1, 2, 4)).sqrt()  # (G, c): the g groups share A
        return norms.repeat_interleave(volume, dim=-1).reshape(*lead, -1)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}
