"""AdaLoRA's orthogonality within a factor, PEGO's towards the frozen weight and between parallel adapters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import to_matrix
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.state import State


@dataclass(frozen=True)
class Orthogonality(Regularizer):
    """γ mean over matrices of ||BᵀB - I||_F and ||AAᵀ - I||_F; B is the paper's P, A its Q.

    The mean is over all A and all B, as in the public code, which sums the norms; `squared=True` sums their squares, as
    the paper does. Zhang et al. 2023; chapter 6.
    """

    gamma: float = 0.1
    squared: bool = False
    free = True

    def __post_init__(self) -> None:
        ranges(self, gamma="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"orthogonal factors, gamma {self.gamma:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        grams = []
        for path in layers(context, self.label, LoRA, Diagonal):
            A, B = state[f"{path}.A"], state[f"{path}.B"]
            grams += [B.mT @ B, A @ A.mT]  # (r, r)
        gaps = [torch.linalg.vector_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
        distance = torch.stack(gaps)
        return self.gamma * (distance.square() if self.squared else distance).mean()


@dataclass(frozen=True)
class Diversity(Regularizer):
    """preserve Σ_i ||A_i W_0ᵀ||_F² + diversify Σ_{i<j} ||A_i A_jᵀ||_F², summed over layers.

    A_1 … A_N are N parallel adapters of rank r in one LoRA of rank N r: consecutive blocks of r rows of A. The first
    term keeps them away from the inputs that W_0 uses, the second from each other; B is left alone. W_0 is (m, n) as
    it stands frozen, nothing else of that size is formed. Hu et al. 2024; the formula is our reconstruction
    (chapter 6).
    """

    blocks: int
    preserve: float = 1e-3
    diversify: float = 1e-3

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise FedloraError(f"blocks must be at least 1, got {self.blocks}")
        ranges(self, preserve="[0, inf)", diversify="[0, inf)")

    free = True

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"PEGO, {self.blocks} blocks, preserve {self.preserve:g}, diversify {self.diversify:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        N, terms = self.blocks, []
        for path, layer in layers(context, self.label, LoRA).items():
            A = state[f"{path}.A"]
            W = to_matrix(layer.base, state.get(f"{path}.base.weight", layer.frozen()))  # (N r, n), (m, n)
            if len(A) % N:
                raise FedloraError(f"'{path}' has rank {len(A)}, which does not split into {N} blocks")
            gram = (A @ A.mT).reshape(N, len(A) // N, N, len(A) // N)
            between = gram.square().sum((1, 3)).triu(1).sum()  # (N, N), i < j
            terms.append(self.preserve * (A @ W.mT).square().sum() + self.diversify * between)
        return torch.stack(terms).sum()
