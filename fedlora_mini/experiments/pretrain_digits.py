"""The classifier's base: a small ViT that has learnt other people's digits, mirrored and in negative.

Its images are the PUBLIC ones of scikit-learn's digits, which no client holds (`data.digits`). Mirrored, with ink and
paper exchanged, they are near enough to be worth starting from and far enough that a client has to adapt.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlora_mini.data.base import Split
from fedlora_mini.data.digits import CLASSES, public_digits
from fedlora_mini.experiments.pretrain import Progress, descend
from fedlora_mini.federation.sampling import generator
from fedlora_mini.losses import task_loss
from fedlora_mini.models.pretrained import save_base
from fedlora_mini.models.zoo import build, check_size


@dataclass(frozen=True)
class DigitPretraining:
    """Steps of Adam on batches of the mirrored negatives, shifted by up to `shift` pixels, with `noise`."""

    model: str = "vit"
    size: int = 12
    steps: int = 1000
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-2
    shift: int = 1
    noise: float = 0.1
    seed: int = 0


def pretrain_digits(config: DigitPretraining, out: Path, progress: Progress = lambda step, loss: None) -> Path:
    """Train from random weights and write `out` (safetensors, with the config inside). Same config, same bytes."""
    check_size(config.model, (config.size, config.size))
    model, data = build(config.model, len(CLASSES), seed=config.seed).train(), foreign(config.size)
    rng = generator(config.seed, "pretrain digits")

    def loss() -> Tensor:
        rows = torch.randint(len(data), (config.batch,), generator=rng)
        x, y = data.images[rows], data.masks[rows]
        dy, dx = torch.randint(-config.shift, config.shift + 1, (2,), generator=rng).tolist()
        x = x.roll((dy, dx), (2, 3)) + config.noise * torch.randn(x.shape, generator=rng)
        return task_loss(model(x), y).mean()

    descend(model, config, loss, progress)
    return save_base(model, out, {"pretraining": asdict(config), "classes": list(CLASSES)})


def foreign(size: int) -> Split:
    """The public digits, mirrored and in negative."""
    data = public_digits(size)
    return Split(1 - data.images.flip(3), data.masks)
