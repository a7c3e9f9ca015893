"""A small SAM: a ViT image encoder, a convolutional mask decoder, a 1x1 head. 2D, about 150 k parameters.

Its three parts are its regions: sharing rules speak of `encoder`, `decoder` and `head`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.errors import FedloraError


class Block(nn.Module):
    """Pre-norm transformer block: z <- z + attn(norm(z)); z <- z + mlp(norm(z))."""

    def __init__(self, d: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, ratio * d), nn.Linear(ratio * d, d)

    def forward(self, z: Tensor) -> Tensor:
        N, T, d = z.shape
        q, k, v = self.qkv(self.norm1(z)).view(N, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, d/heads)
        z = z + self.proj(a.transpose(1, 2).reshape(N, T, d))
        return z + self.down(F.gelu(self.up(self.norm2(z))))


class Encoder(nn.Module):
    """Image (N, c, H, W) -> features at 1/2 (N, stem, H/2, W/2) and tokens at 1/4 (N, d, H/4, W/4)."""

    def __init__(self, c: int, stem: int, d: int, depth: int, heads: int, ratio: int, grid: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(c, stem, 3, stride=2, padding=1)
        self.patch = nn.Conv2d(stem, d, 3, stride=2, padding=1)
        self.position = nn.Parameter(torch.zeros(1, d, grid, grid))
        self.blocks = nn.ModuleList(Block(d, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = F.gelu(self.stem(x))
        z = self.patch(skip)
        position: Tensor = self.position
        if position.shape[2:] != z.shape[2:]:
            position = F.interpolate(position, size=z.shape[2:], mode="bilinear", align_corners=False)
        z = z + position
        N, d, h, w = z.shape
        z = z.flatten(2).transpose(1, 2)  # (N, h*w, d)
        for block in self.blocks:
            z = block(z)
        return skip, self.norm(z).transpose(1, 2).reshape(N, d, h, w)


class Decoder(nn.Module):
    """Two upsampling steps by transposed convolution, with the encoder's half-resolution features beside the first."""

    def __init__(self, stem: int, d: int, width: int) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(d, 2 * width, 2, stride=2)
        self.mix1, self.norm1 = nn.Conv2d(2 * width + stem, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.mix2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width)

    def forward(self, skip: Tensor, z: Tensor) -> Tensor:
        y = F.gelu(self.norm1(self.mix1(torch.cat([self.up1(z), skip], 1))))  # (N, 2*width, H/2, W/2)
        return F.gelu(self.norm2(self.mix2(self.up2(y))))  # (N, width, H, W)


class MiniSAM(nn.Module):
    """(N, channels, H, W) in [0, 1] -> logits (N, classes, H, W). H and W are multiples of 4."""

    def __init__(
        self,
        classes: int = 2,
        channels: int = 3,
        d: int = 64,
        depth: int = 3,
        heads: int = 2,
        ratio: int = 2,
        stem: int = 16,
        width: int = 16,
        grid: int = 16,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(channels, stem, d, depth, heads, ratio, grid)
        self.decoder = Decoder(stem, d, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] % 4 or x.shape[3] % 4:
            raise FedloraError(f"MiniSAM needs (N, C, H, W) with H and W multiples of 4, got {tuple(x.shape)}")
        return self.head(self.decoder(*self.encoder(x * 2 - 1)))
