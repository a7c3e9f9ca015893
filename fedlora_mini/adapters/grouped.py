"""One leading axis on every factor: G = N samples gives per-sample gradients, G = K clients K local steps at once.

The frozen network runs once on the whole batch; only the thin path beside it is grouped (`ops`).
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter, call
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
    moves: Collection[str] | None = None,
    owner: Tensor | None = None,
) -> tuple[State, Tensor]:
    """g_i = d loss_i / d state for every image i in one backward pass: (State of (N, …), losses (N,)).

    `loss(logits, y)` returns (N,). Every sample sees its own view of the one state (G = N), so what `backward` would
    leave summed stays apart. A row is an image, also inside Swin's windows. moves: the names whose gradient is wanted,
    else all. owner: the state holds K clients', (K, …) each, and image i sees that of client owner[i]. Raises where
    rows would not be per sample: tensors without a group axis, merged adapters, batch statistics. Chapter 15;
    the relatives are PyTorch's and Opacus' expanded weights.
    """
    wanted = [name for name in state if moves is None or name in moves]
    modules = dict(model.named_modules())
    shared = {n: v for n, v in state.items() if n not in wanted and not _is_factor(n, modules)}  # as frozen weights are
    check_groupable(modules, [name for name in state if name not in shared])
    if len(x) == 0:  # Poisson sampling draws nobody now and then
        one = {name: state[name] if owner is None else state[name][0] for name in wanted}
        return {name: value.new_zeros(0, *value.shape) for name, value in one.items()}, x.new_zeros(0)
    own = {name: value for name, value in state.items() if name not in shared}
    if owner is None:
        leaves = expand(own, x.shape[0])
    else:
        leaves = {name: value.detach()[owner].requires_grad_() for name, value in own.items()}
    for name in leaves.keys() - set(wanted):
        leaves[name].requires_grad_(False)
    losses = loss(call(model, leaves | shared, x), y)
    if losses.shape != x.shape[:1]:
        raise FedloraError(f"the loss must be one number per image, {tuple(x.shape[:1])}, not {tuple(losses.shape)}")
    with torch.autocast(x.device.type, enabled=False):  # the backward pass keeps the types that the forward one chose
        gradients = torch.autograd.grad(losses.sum(), [leaves[name] for name in wanted])
    return dict(zip(wanted, gradients, strict=True)), losses.detach()


def _is_factor(name: str, modules: Mapping[str, nn.Module]) -> bool:
    path, _, factor = name.rpartition(".")
    layer = modules.get(path)
    return isinstance(layer, Adapter) and factor in layer.factors


def check_groupable(modules: Mapping[str, nn.Module], names: Collection[str]) -> None:
    """Raise unless no layer mixes the batch, and every name is that of a factor of an unmerged adapter.

    Norms in eval mode, as `freeze` leaves them, use stored statistics: they mix nothing, and write none of the images'.
    """
    for path, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise FedloraError(
                f"batch norm '{path}' mixes the samples of a batch by its statistics; call freeze or eval first"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and module.track_running_stats:
            raise FedloraError(
                f"instance norm '{path}' keeps the mean statistics of its images; call freeze or eval first"
            )
    for name in names:
        path = name.rpartition(".")[0]
        if not _is_factor(name, modules):
            raise FedloraError(
                f"'{name}' is no adapter's factor and cannot carry a group axis; recipes whose `grouped` is true can"
            )
        if modules[path].merged:
            raise FedloraError(f"the adapter at '{path}' is merged: its factors do nothing; call unmerge(model)")
