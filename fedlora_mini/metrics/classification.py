"""How often a model names an image's class, and how sure it was."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.adapters.base import call, check_unmerged
from fedlora_mini.data.base import Split
from fedlora_mini.state import State


@dataclass(frozen=True)
class Recognition:
    """`accuracy`, the share of images that were named right; `loss`, the mean cross-entropy.

    `per_class`: the share among the images of a class (its recall); NaN where the split has none.
    """

    accuracy: float
    loss: float
    per_class: dict[str, float]


def recognition(logits: Tensor, truth: Tensor, names: tuple[str, ...]) -> Recognition:
    """Compare logits (N, classes) with labels (N,)."""
    logits, truth = logits.cpu().float(), truth.cpu().long()
    right = (logits.argmax(1) == truth).double()
    per_class = {name: float(right[truth == c].mean()) for c, name in enumerate(names)}
    return Recognition(float(right.mean()), float(F.cross_entropy(logits, truth)), per_class)


@torch.no_grad()
def recognise(model: nn.Module, state: State, split: Split, names: tuple[str, ...], batch: int = 512) -> Recognition:
    """`recognition` of the model with the tensors of `state`. Raises for a state that a merged adapter would ignore."""
    if state:
        check_unmerged(model)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    logits = [call(model, state, chunk.to(device)) for chunk in split.images.split(batch)]
    model.train(training)
    return recognition(torch.cat(logits), split.masks, names)
