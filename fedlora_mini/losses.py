"""L_seg = cross-entropy + (1 - Dice), a value per sample, so that samples and clients can be told apart.

Where an image has one label, there are no areas to overlap, and what is left is the cross-entropy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora_mini.data.base import IGNORE


def _full(logits: Tensor) -> Tensor:
    """At least single precision: sums over an image are too long for half."""
    return logits if logits.dtype == torch.float64 else logits.float()


def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - mean over foreground classes c of (2 sum_x p_c t_c + s) / (sum_x p_c + sum_x t_c + s).

    logits (N, C, *S), target (N, *S) of integers; voxels with IGNORE count nowhere. Returns (N,).
    """
    valid = (target != IGNORE).unsqueeze(1)  # (N, 1, *S)
    probability = _full(logits).softmax(1) * valid
    truth = torch.zeros_like(probability).scatter_(1, (target.long() * valid[:, 0]).unsqueeze(1), 1.0) * valid
    axes = tuple(range(2, logits.dim()))
    overlap = (probability * truth).sum(axes)[:, 1:]  # (N, C-1)
    total = (probability.sum(axes) + truth.sum(axes))[:, 1:]
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean(1)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy + soft Dice with equal weight, per sample: (N,)."""
    entropy = F.cross_entropy(_full(logits), target.long(), ignore_index=IGNORE, reduction="none").flatten(1)
    counted = (target != IGNORE).flatten(1).sum(1).clamp(min=1)
    return entropy.sum(1) / counted + soft_dice_loss(logits, target)


def task_loss(logits: Tensor, target: Tensor) -> Tensor:
    """`segmentation_loss` for logits (N, C, *S) and target (N, *S), cross-entropy for (N, C) and (N,): (N,)."""
    if logits.dim() > 2:
        return segmentation_loss(logits, target)
    return F.cross_entropy(_full(logits), target.long(), reduction="none")
