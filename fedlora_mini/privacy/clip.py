"""g_i min(1, C / ||g_i||): no sample moves the sum by more than C."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.state import State

GAMMA = 0.01  # of automatic clipping, Bu et al. 2023


def norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """||g_i||, flat over all tensors of the step. gradients: (N, …) each; returns (N,)."""
    return _length(_rows(gradients))


def _rows(gradients: Mapping[str, Tensor]) -> Tensor:
    """One row a sample, all tensors beside each other, (N, P): a few calls then do for any number of tensors."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def flat(layers: Sequence[Tensor], norm: Tensor, C: float) -> list[Tensor]:
    """min(1, C / ||g_i||) for all of a gradient: one ball around the whole vector."""
    return [(C / norm).clamp(max=1.0)]  # 0/0 cannot occur: C > 0, and C/0 = inf is clamped


def per_layer(layers: Sequence[Tensor], norm: Tensor, C: float) -> list[Tensor]:
    """min(1, C_l / ||g_il||) with C_l = C / sqrt(number of layers): one ball a layer, together within radius C."""
    return [(C / len(layers) ** 0.5 / _length(rows)).clamp(max=1.0) for rows in layers]


def normalised(layers: Sequence[Tensor], norm: Tensor, C: float) -> list[Tensor]:
    """C / (||g_i|| + 0.01): every gradient gets a length near C, so that C and the learning rate are one number."""
    return [C / (norm + GAMMA)]


CLIPS: dict[str, Callable[[Sequence[Tensor], Tensor, float], list[Tensor]]] = {
    "flat": flat,
    "per-layer": per_layer,
    "normalised": normalised,
}
"""From the gradients by layer, (N, P_l) each, and their whole norms, (N,): one factor (N,) for all, or one a layer."""


def clip_sum(gradients: Mapping[str, Tensor], C: float, how: str = "flat") -> State:
    """sum_i c_i g_i with ||c_i g_i|| <= C. gradients: (N, …) each, of which one copy is made; returns (…).

    Its sensitivity to adding or removing one sample is C: the noise is the caller's. how: "flat" is min(1, C / ||g_i||)
    (Abadi et al. 2016), "per-layer" clips every layer to its share (McMahan et al. 2018), "normalised" is automatic
    clipping (Bu et al. 2023). C = inf is the plain sum. A gradient whose norm is not finite counts as 0: otherwise one
    sample decides whether there is a sum. Inside autocast too it is a sum in the gradients' own precision: rounding
    could lengthen it. Raises for a C that is not positive, another `how`, and "normalised" without a finite C.
    Chapter 14.
    """
    if not C > 0:
        raise FedloraError(f"the clipping norm C must be positive, got {C}")
    if how not in CLIPS:
        raise unknown("way to clip", how, CLIPS)
    if how == "normalised" and math.isinf(C):
        raise FedloraError("normalised gradients have length C, which must be finite")
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, g in gradients.items():
        by_layer.setdefault(name.rpartition(".")[0], {})[name] = g
    ordered = {name: g for layer in by_layer.values() for name, g in layer.items()}
    rows = _rows(ordered)
    norm = _length(rows)
    layers = rows.split([sum(g.shape[1:].numel() for g in layer.values()) for layer in by_layer.values()], dim=1)
    factors = CLIPS[how](layers, norm, C)
    rows.nan_to_num_(0.0, 0.0, 0.0)  # its factor is 0, and 0 * inf is not 0
    blocks = layers if len(factors) > 1 else [rows]
    factors = [c.masked_fill(~torch.isfinite(norm), 0.0) for c in factors]
    with torch.autocast(rows.device.type, enabled=False):
        total = torch.cat([(c[None] @ block)[0] for c, block in zip(factors, blocks, strict=True)])
    flats = total.split([g.shape[1:].numel() for g in ordered.values()])
    sums = {name: own.view(g.shape[1:]) for (name, g), own in zip(ordered.items(), flats, strict=True)}
    return {name: sums[name] for name in gradients}
