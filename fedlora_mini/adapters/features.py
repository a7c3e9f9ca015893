"""z = the head's input: what the body makes of an image, (N, c, *S), beside the logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter, call, region
from fedlora_mini.adapters.ops import LAYERS
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


def head(model: nn.Module) -> nn.Module:
    """The first layer of the region 'head', with its adapter if it has one."""
    for path, module in model.named_modules():
        if path and isinstance(module, (Adapter, *LAYERS)) and region(model, path) == "head":
            return module
    raise FedloraError(f"{type(model).__name__} has no layer in the region 'head'")


def embed(model: nn.Module, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, z) of the model with the tensors of `state`, in one pass.

    z is in single precision at least: sums over its voxels are too long for half.
    """
    seen: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits = call(model, state, x)
    finally:
        handle.remove()
    z = seen[0]
    return logits, z if z.dtype == torch.float64 else z.float()


def class_means(z: Tensor, masks: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Masked average pooling: prototypes (C, c), the mean of z over the voxels of each class, and their counts (C,).

    z: (N, c, *S'), masks: (N, *S) of integers; z is resized to the masks where the sizes differ. A class without a
    voxel has a prototype of zeros and count 0.
    """
    if z.shape[2:] != masks.shape[1:]:
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[z.dim()]
        z = torch.nn.functional.interpolate(z, masks.shape[1:], mode=mode, align_corners=False)
    vectors, labels = z.movedim(1, -1).reshape(-1, z.shape[1]), masks.reshape(-1).long()  # (P, c), (P,)
    known = labels < classes
    vectors, labels = vectors[known], labels[known]
    sums = vectors.new_zeros(classes, z.shape[1]).index_add(0, labels, vectors)
    counts = torch.bincount(labels, minlength=classes).to(vectors)
    return sums / counts.clamp(min=1)[:, None], counts


def statistic(name: str) -> bool:
    """Whether it names a norm's running mean or variance: passes in training mode write it, no gradient does."""
    return name.rpartition(".")[2].startswith("running_")


@contextmanager
def in_use(model: nn.Module) -> Iterator[None]:
    """The model as it is used after training: norms read their running statistics and write none."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
