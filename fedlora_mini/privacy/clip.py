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
    each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]  # (N,) a tensor
    return torch.linalg.vector_norm(torch.stack(each), dim=0)


def flat(gradients: Mapping[str, Tensor], C: float) -> State:
    """min(1, C / ||g_i||) for every tensor: one ball around the whole vector."""
    factor = (C / norms(gradients)).clamp(max=1.0)  # 0/0 cannot occur: C > 0, and C/0 = inf is clamped
    return dict.fromkeys(gradients, factor)


def per_layer(gradients: Mapping[str, Tensor], C: float) -> State:
    """min(1, C_l / ||g_il||) with C_l = C / sqrt(number of layers): one ball a layer, together within radius C."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, g in gradients.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = g
    factors: State = {}
    for layer in layers.values():
        factors |= flat(layer, C / len(layers) ** 0.5)
    return {name: factors[name] for name in gradients}


def normalised(gradients: Mapping[str, Tensor], C: float) -> State:
    """C / (||g_i|| + 0.01): every gradient gets a length near C, so that C and the learning rate are one number."""
    return dict.fromkeys(gradients, C / (norms(gradients) + GAMMA))


CLIPS: dict[str, Callable[[Mapping[str, Tensor], float], State]] = {
    "flat": flat,
    "per-layer": per_layer,
    "normalised": normalised,
}


def clip_sum(gradients: Mapping[str, Tensor], C: float, how: str = "flat") -> State:
    """sum_i c_i g_i with ||c_i g_i|| <= C, without scaled copies of the g_i. gradients: (N, …) each; returns (…).

    Its sensitivity to adding or removing one sample is C: the noise is the caller's. how: "flat" is min(1, C / ||g_i||)
    (Abadi et al. 2016), "per-layer" clips every layer to its share (McMahan et al. 2018), "normalised" is automatic
    clipping (Bu et al. 2023). C = inf is the plain sum. A gradient that is not finite makes the sum not finite.
    methods.md card 1.1.
    """
    if not C > 0:
        raise FedloraError(f"the clipping norm C must be positive, got {C}")
    if how not in CLIPS:
        raise unknown("way to clip", how, CLIPS)
    if how == "normalised" and math.isinf(C):
        raise FedloraError("normalised gradients have length C, which must be finite")
    factors = CLIPS[how](gradients, C)
    return {name: torch.tensordot(factors[name].to(g.dtype), g, dims=1) for name, g in gradients.items()}
