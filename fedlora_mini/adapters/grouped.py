"""One leading axis on every factor: G = N samples gives per-sample gradients, G = K clients K local steps at once.

The frozen network runs once on the whole batch; only the thin path beside it is grouped (`ops`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import adapters, call
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


def expand(state: Mapping[str, Tensor], G: int) -> State:
    """One copy seen G times: (…) -> leaves (G, …) that require gradients and share one memory."""
    return {name: value.detach().expand(G, *value.shape).requires_grad_() for name, value in state.items()}


def per_sample_gradients(
    model: nn.Module,
    state: Mapping[str, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> tuple[State, Tensor]:
    """g_i = d loss_i / d state for every image i in one backward pass: (State of (N, …), losses (N,)).

    `loss(logits, y)` returns (N,). Every sample sees its own view of the one state (G = N), so what `backward` would
    leave summed stays apart. A row is an image, also inside Swin's windows. Raises where rows would not be per sample:
    tensors without a group axis, merged adapters, batch statistics. methods.md card 1.1; the relatives are PyTorch's
    and Opacus' expanded weights.
    """
    check_groupable(model, state)
    if len(x) == 0:  # Poisson sampling draws nobody now and then
        return {name: value.new_zeros(0, *value.shape) for name, value in state.items()}, x.new_zeros(0)
    leaves = expand(state, x.shape[0])
    losses = loss(call(model, leaves, x), y)
    if losses.shape != x.shape[:1]:
        raise FedloraError(f"the loss must be one number per image, {tuple(x.shape[:1])}, not {tuple(losses.shape)}")
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), losses.detach()


def check_groupable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless every tensor of `state` is a factor of an unmerged adapter and no layer mixes the batch."""
    found = dict(adapters(model))
    for name in state:
        path, _, factor = name.rpartition(".")
        if path not in found or factor not in found[path].factors:
            raise FedloraError(
                f"'{name}' is no adapter's factor and cannot carry a group axis; recipes whose `grouped` is true can"
            )
        if found[path].merged:
            raise FedloraError(f"the adapter at '{path}' is merged: its factors do nothing; call unmerge(model)")
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise FedloraError(f"'{path}' mixes the samples of a batch by its statistics; call freeze or eval first")
