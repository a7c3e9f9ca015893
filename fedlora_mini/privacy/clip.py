"""g_i min(1, C / ||g_i||): no sample moves the sum by more than C."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


def norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """||g_i||, flat over all tensors of the step. gradients: (N, …) each; returns (N,)."""
    each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]  # (N,) a tensor
    return torch.linalg.vector_norm(torch.stack(each), dim=0)


def clip_sum(gradients: Mapping[str, Tensor], C: float) -> State:
    """sum_i g_i min(1, C / ||g_i||), without scaled copies of the g_i. gradients: (N, …) each; returns (…).

    Its sensitivity to adding or removing one sample is C: the noise is the caller's. C = inf is the plain sum. A
    gradient that is not finite makes the sum not finite. methods.md card 1.1; Abadi et al. 2016.
    """
    if not C > 0:
        raise FedloraError(f"the clipping norm C must be positive, got {C}")
    factors = (C / norms(gradients)).clamp(max=1.0)  # 0/0 cannot occur: C > 0, and C/0 = inf is clamped
    return {name: torch.tensordot(factors.to(g.dtype), g, dims=1) for name, g in gradients.items()}
