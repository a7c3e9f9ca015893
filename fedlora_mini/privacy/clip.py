"""g_i min(1, C / ||g_i||): no sample moves the sum by more than C."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.state import State

GAMMA = 0.01  # of automatic clipping, Bu et al. 2023


def norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """||g_i||, flat over all tensors of the step. gradients: (N, …) each; returns (N,)."""
    return _whole(_by_tensor(gradients))


def _by_tensor(gradients: Mapping[str, Tensor]) -> State:
    """||g_i|| of every tensor by itself, (N,) each: what clips read."""
    return {name: torch.linalg.vector_norm(g.flatten(1), dim=1) for name, g in gradients.items()}


def _whole(lengths: Mapping[str, Tensor]) -> Tensor:
    """The norm over several tensors from the norms of each."""
    return torch.linalg.vector_norm(torch.stack(list(lengths.values())), dim=0)


def _usable(factor: Tensor, norm: Tensor) -> Tensor:
    """The factor of every gradient, 0 where the norm of the whole gradient is not finite."""
    return factor.masked_fill(~torch.isfinite(norm), 0.0)


def flat(lengths: Mapping[str, Tensor], C: float) -> State:
    """min(1, C / ||g_i||) for every tensor: one ball around the whole vector."""
    norm = _whole(lengths)
    factor = (C / norm).clamp(max=1.0)  # 0/0 cannot occur: C > 0, and C/0 = inf is clamped
    return dict.fromkeys(lengths, _usable(factor, norm))


def per_layer(lengths: Mapping[str, Tensor], C: float) -> State:
    """min(1, C_l / ||g_il||) with C_l = C / sqrt(number of layers): one ball a layer, together within radius C."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, length in lengths.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = length
    norm = _whole(lengths)
    factors: State = {}
    for layer in layers.values():
        share = C / len(layers) ** 0.5
        factors |= dict.fromkeys(layer, _usable((share / _whole(layer)).clamp(max=1.0), norm))
    return {name: factors[name] for name in lengths}


def normalised(lengths: Mapping[str, Tensor], C: float) -> State:
    """C / (||g_i|| + 0.01): every gradient gets a length near C, so that C and the learning rate are one number."""
    norm = _whole(lengths)
    return dict.fromkeys(lengths, _usable(C / (norm + GAMMA), norm))


CLIPS: dict[str, Callable[[Mapping[str, Tensor], float], State]] = {
    "flat": flat,
    "per-layer": per_layer,
    "normalised": normalised,
}


def clip_sum(gradients: Mapping[str, Tensor], C: float, how: str = "flat") -> State:
    """sum_i c_i g_i with ||c_i g_i|| <= C, without scaled copies of the g_i. gradients: (N, …) each; returns (…).

    Its sensitivity to adding or removing one sample is C: the noise is the caller's. how: "flat" is min(1, C / ||g_i||)
    (Abadi et al. 2016), "per-layer" clips every layer to its share (McMahan et al. 2018), "normalised" is automatic
    clipping (Bu et al. 2023). C = inf is the plain sum. A gradient whose norm is not finite counts as 0: otherwise one
    sample decides whether there is a sum. methods.md card 1.1.
    """
    if not C > 0:
        raise FedloraError(f"the clipping norm C must be positive, got {C}")
    if how not in CLIPS:
        raise unknown("way to clip", how, CLIPS)
    if how == "normalised" and math.isinf(C):
        raise FedloraError("normalised gradients have length C, which must be finite")
    factors = CLIPS[how](_by_tensor(gradients), C)
    return {name: _weighted(factors[name].to(g.dtype), g) for name, g in gradients.items()}


def _weighted(factor: Tensor, g: Tensor) -> Tensor:
    """sum_i c_i g_i. What is not finite stands in rows of factor 0, and 0 * inf is not 0: it is set to 0 first."""
    rows = g.flatten(1).nan_to_num(0.0, 0.0, 0.0)  # (N, …)
    return (factor[None] @ rows).view(g.shape[1:])
