"""A small vision transformer that gives an image one label: patches, blocks, the mean token, a linear head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.errors import FedloraError
from fedlora_mini.models.minisam import Block


class Tokens(nn.Module):
    """Image (N, c, H, W) -> tokens (N, T, d): patches of side `patch`, their positions, `depth` blocks, a LayerNorm."""

    def __init__(self, c: int, patch: int, d: int, depth: int, heads: int, ratio: int, grid: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(c, d, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, d, grid, grid))
        self.blocks = nn.ModuleList(Block(d, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch(x)
        position: Tensor = self.position
        if position.shape[2:] != z.shape[2:]:
            position = F.interpolate(position, size=z.shape[2:], mode="bilinear", align_corners=False)
        z = (z + position).flatten(2).transpose(1, 2)  # (N, T, d)
        for block in self.blocks:
            z = block(z)
        return self.norm(z)


class ViT(nn.Module):
    """(N, channels, H, W) in [0, 1] -> logits (N, classes). H and W are multiples of `patch`."""

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        d: int = 32,
        depth: int = 1,
        heads: int = 2,
        ratio: int = 2,
        patch: int = 4,
        grid: int = 3,
    ) -> None:
        super().__init__()
        self.side = patch
        self.encoder = Tokens(channels, patch, d, depth, heads, ratio, grid)
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] % self.side or x.shape[3] % self.side:
            raise FedloraError(f"ViT needs (N, C, H, W) with multiples of {self.side}, got {tuple(x.shape)}")
        return self.head(self.encoder(x * 2 - 1).mean(1))
