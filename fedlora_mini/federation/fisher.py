"""F_i = mean over images of (∂ℓ/∂θ_i)²: the diagonal of the empirical Fisher information, image by image.

ℓ is the pixel-mean cross-entropy: Fisher information belongs to a log-likelihood, which Dice is not. Squaring the
gradient of a batch's mean instead is a smaller quantity: for n independent images of mean zero, n times smaller.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.adapters.base import adapters, call
from fedlora_mini.adapters.features import in_use, statistic
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.data.base import IGNORE, Split
from fedlora_mini.state import State


def log_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, the mean over an image's pixels: (N,)."""
    entropy = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none").flatten(1)
    return entropy.sum(1) / (target != IGNORE).flatten(1).sum(1).clamp(min=1)


def diagonal_fisher(
    model: nn.Module, state: Mapping[str, Tensor], data: Split, images: int = 64, batch: int = 8
) -> State:
    """Of every tensor in `state` but norms' statistics, over the first min(images, n) images, of the model in use.

    Through the group axis where everything trained is an adapter's factor, in one backward pass a batch; a model's own
    weights go one image at a time. A zero `Dense` beside each layer and `Affine` at each norm could carry the axis for
    them, but nothing for a parameter outside all layers, as MiniSAM's `position`; and every layer would run twice, once
    with a kernel an image, so that little or nothing would be gained.
    """
    state = {name: value.detach() for name, value in state.items()}
    factors = {f"{path}.{factor}" for path, adapter in adapters(model) for factor in adapter.factors}
    rows = min(images, len(data))
    total = {name: torch.zeros_like(value) for name, value in state.items() if not statistic(name)}
    with in_use(model):
        for x, y in zip(data.images[:rows].split(batch), data.masks[:rows].split(batch), strict=True):
            if factors.issuperset(state):
                gradients, _ = per_sample_gradients(model, state, log_loss, x, y)  # of (N, …)
                for name in total:
                    total[name] += gradients[name].square().sum(0)
                continue
            for i in range(len(x)):
                leaves = {name: state[name].clone().requires_grad_() for name in total}
                value = log_loss(call(model, {**state, **leaves}, x[i : i + 1]), y[i : i + 1]).sum()
                gradient = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                for name, g in zip(leaves, gradient, strict=True):
                    total[name] += 0.0 if g is None else g.square()
    return {name: value / rows for name, value in total.items()}
