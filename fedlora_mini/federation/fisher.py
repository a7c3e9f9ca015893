"""F_i = mean over images of (∂ℓ/∂θ_i)²: the diagonal of the empirical Fisher information, image by image.

ℓ is the pixel-mean cross-entropy: Fisher information belongs to a log-likelihood, which Dice is not. Squaring the
gradient of a batch's mean instead is a smaller quantity: for n independent images of mean zero, n times smaller.
"""

import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from fedlora_mini import state as S
from fedlora_mini.adapters.base import adapters, call
from fedlora_mini.adapters.features import in_use, statistic
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.data.base import IGNORE, Split
from fedlora_mini.state import State


def log_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, the mean over an image's pixels, or that of its one label: (N,)."""
    entropy = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none")
    told = (target != IGNORE).reshape(len(target), -1)
    return entropy.reshape(told.shape).sum(1) / told.sum(1).clamp(min=1)


def diagonal_fisher(
    model: nn.Module, state: Mapping[str, Tensor], data: Split, images: int = 64, batch: int = 8
) -> State:
    """Of every tensor in `state` but norms' statistics, over the first min(images, n) images, of the model in use.

    One backward pass a batch, which holds the gradients of `batch` images at once: along the group axis where all that
    is trained are adapters' factors, else, as a model's own weights have none, by `mapped_gradients`.
    """
    state = {name: value.detach() for name, value in state.items()}
    factors = {f"{path}.{factor}" for path, adapter in adapters(model) for factor in adapter.factors}
    rows = min(images, len(data))
    total = {name: torch.zeros_like(value) for name, value in state.items() if not statistic(name)}
    with in_use(model):
        for x, y in zip(data.images[:rows].split(batch), data.masks[:rows].split(batch), strict=True):
            if factors.issuperset(state):
                gradients, _ = per_sample_gradients(model, state, log_loss, x, y)  # of (N, …)
            else:
                gradients = mapped_gradients(model, state, x, y)
            for name in total:
                total[name] += gradients[name].square().sum(0)
    return {name: value / rows for name, value in total.items()}


def mapped_gradients(model: nn.Module, state: State, x: Tensor, y: Tensor) -> State:
    """∂ℓ_i/∂θ of every tensor but norms' statistics: (N, …). One image's gradient, mapped over the batch."""
    fixed, moving = S.pick(state, statistic), S.pick(state, lambda name: not statistic(name))

    def loss(theta: State, x: Tensor, y: Tensor) -> Tensor:
        return log_loss(call(model, fixed | theta, x[None]), y[None])[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # attention goes image by image, and no slower
        return vmap(grad(loss), (None, 0, 0))(moving, x, y)
