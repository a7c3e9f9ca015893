"""Dice and the 95th-percentile Hausdorff distance of a model on a split, from MONAI."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import call, check_unmerged
from fedlora_mini.data.base import IGNORE, Split
from fedlora_mini.state import State


@dataclass(frozen=True)
class Scores:
    """Means over images and foreground classes: Dice over pairs that the truth holds, HD95 over these and false alarms.

    `hd95` in pixels; None if it was not asked for. `false_alarms`: share of (image, class) pairs absent from the truth
    in which the model found something; None if no pair is absent. Dice has no value there.
    """

    dice: float
    hd95: float | None
    per_class: dict[str, float]
    false_alarms: float | None


@torch.no_grad()
def predict(model: nn.Module, state: State, images: Tensor, batch: int = 64) -> Tensor:
    """(N, C, *S) -> (N, *S) labels, on the model's device. Raises for a state that a merged adapter would ignore."""
    if state:
        check_unmerged(model)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    labels = [call(model, state, chunk.to(device)).argmax(1).to(torch.uint8) for chunk in images.split(batch)]
    model.train(training)
    return torch.cat(labels)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N, *S) -> (N, classes, *S) float."""
    return torch.nn.functional.one_hot(labels.long(), classes).movedim(-1, 1).float()


def score(labels: Tensor, truth: Tensor, names: tuple[str, ...], hd95: bool = True) -> Scores:
    """Compare predicted labels with the truth, both (N, *S). `names[0]` is the background.

    Pixels with IGNORE count as background on both sides. Where one of the two surfaces is missing, HD95 is the image
    diagonal, the worst value there is; where both are missing it has no value.
    """
    from monai.metrics import compute_dice, compute_hausdorff_distance

    labels, truth = labels.cpu(), truth.cpu()
    judged = truth != IGNORE
    found, wanted = one_hot(labels * judged, len(names)), one_hot(truth * judged, len(names))
    dice = compute_dice(found, wanted, include_background=False, ignore_empty=True)  # (N, C-1), NaN if absent
    absent = wanted[:, 1:].flatten(2).sum(2) == 0
    empty = found[:, 1:].flatten(2).sum(2) == 0
    distance = None
    if hd95:
        both = ~absent & ~empty
        table = torch.full(both.shape, math.dist(truth.shape[1:], (0,) * (truth.dim() - 1)))
        table[absent & empty] = torch.nan
        for c in range(both.shape[1]):
            rows = both[:, c]
            if rows.any():
                pair = found[rows][:, [c + 1]], wanted[rows][:, [c + 1]]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # MONAI's own, about its own argument
                    surface = compute_hausdorff_distance(*pair, include_background=True, percentile=95)
                table[rows, c] = surface[:, 0].float()
        distance = float(table.nanmean())
    return Scores(
        dice=float(dice.nanmean()),
        hd95=distance,
        per_class={name: float(dice[:, c].nanmean()) for c, name in enumerate(names[1:])},
        false_alarms=float((~empty[absent]).float().mean()) if absent.any() else None,
    )


def evaluate(model: nn.Module, state: State, split: Split, names: tuple[str, ...], hd95: bool = True) -> Scores:
    """`score` of the model with the tensors of `state`."""
    return score(predict(model, state, split.images), split.masks, names, hd95)
