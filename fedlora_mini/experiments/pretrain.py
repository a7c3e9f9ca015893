"""A foundation model in minutes: supervised pre-training of the small network on un-shifted phantoms, from a seed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.base import region
from fedlora_mini.data import phantom
from fedlora_mini.data.base import IGNORE
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.sampling import generator
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models.pretrained import save_base
from fedlora_mini.models.zoo import build, check_size, check_task


@dataclass(frozen=True)
class Pretraining:
    """`novel` is the structure that pre-training must not know: its pixels are ignored, not called background.

    A share `plain` of every batch is un-shifted, the rest has a random wide appearance.
    """

    model: str = "minisam"
    size: int = 64
    steps: int = 1500
    batch: int = 16
    lr: float = 3e-3
    weight_decay: float = 1e-4
    reconstruction: float = 1.0  # weight of the auxiliary task: paint the un-noised image again
    plain: float = 1.0
    novel: str = "vessel"
    seed: int = 0

    def __post_init__(self) -> None:
        ranges(self, size="[8, 4096]", steps="[1, inf)", batch="[1, inf)", seed="[0, 18446744073709551616)")
        check_task(self.model, "segmentation")


Progress = Callable[[int, float], None]
"""(step from 1, its loss)."""


def pretrain(config: Pretraining, out: Path, progress: Progress = lambda step, loss: None) -> Path:
    """Train from random weights and write `out` (safetensors, with the config inside). Same config, same bytes.

    The auxiliary reconstruction head is thrown away; the segmentation head is kept for phantoms.
    """
    if config.novel and config.novel not in phantom.CLASSES[1:]:
        raise unknown("phantom class", config.novel, phantom.CLASSES[1:])
    check_size(config.model, (config.size, config.size))
    model = build(config.model, len(phantom.CLASSES), seed=config.seed).train()
    task = _Reconstruction(model)
    rng = generator(config.seed, "pretrain")

    def loss() -> Tensor:
        x, y = _batch(config, rng)
        logits, painted = task(x + 0.05 * torch.randn(x.shape, generator=rng))
        return segmentation_loss(logits, y).mean() + config.reconstruction * F.mse_loss(painted, x)

    descend(task, config, loss, progress)
    return save_base(model, out, {"pretraining": asdict(config), "classes": list(phantom.CLASSES)})


class Course(Protocol):
    """What `descend` reads of a config."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def descend(model: nn.Module, config: Course, draw: Callable[[], Tensor], progress: Progress) -> None:
    """Adam, its rate in one cycle over `steps`, on losses of fresh batches; raises where one is not finite."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps, pct_start=0.1)
    for step in range(1, config.steps + 1):
        loss = draw()
        if not torch.isfinite(loss):
            raise FedloraError(f"pre-training diverged at step {step}: the loss is {loss.item()}; lower lr {config.lr}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(step, loss.item())


def _batch(config: Pretraining, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    plain = round(config.plain * config.batch)
    parts = [phantom.sample(plain, config.size, rng)] if plain else []
    if plain < config.batch:
        parts.append(phantom.sample(config.batch - plain, config.size, rng, randomise=True))
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if config.novel:
        y = torch.where(y == phantom.CLASSES.index(config.novel), IGNORE, y)
    return x, y


class _Reconstruction(nn.Module):
    """The network with a second 1x1 head beside its own, on the same features: it repaints the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head = [m for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and region(model, p) == "head"][-1]
        self.paint = nn.Conv2d(head.in_channels, 3, 1)
        nn.init.zeros_(self.paint.weight)
        nn.init.zeros_(self.paint.bias)  # type: ignore[arg-type]
        self.features: Tensor | None = None
        head.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        assert self.features is not None
        return logits, self.paint(self.features)
