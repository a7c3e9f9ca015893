"""∇_A <- (BᵀB + εI)⁻¹ ∇_A, ∇_B <- ∇_B (AAᵀ + εI)⁻¹: steps that do not depend on how BA is split into B and A."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.state import State


def solve(gram: Tensor, eps: float, right: Tensor) -> Tensor:
    """(gram + εI)⁻¹ right by Cholesky, in float64: with ε = 1e-6 the matrix may be singular in single precision."""
    damped = gram.double() + eps * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.cholesky_solve(right.double(), torch.linalg.cholesky(damped)).to(right.dtype)


@dataclass(frozen=True)
class Riemannian(Regularizer):
    """Scaled gradients for LoRA layers, before SGD's step or Adam's moments.

    With ε -> 0 a step of SGD moves BA by -lr (P_B ∇_W + ∇_W P_A), P_B and P_A the projections on B's columns and A's
    rows: both are the same for (B R, R⁻¹ A). Zhang and Pilanci 2024; chapter 4.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise FedloraError(f"eps must be positive, got {self.eps}: B = 0 at the start has no inverse")

    free = True

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"Riemannian preconditioner, eps {self.eps:g}"

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        for path in layers(context, self.label, LoRA):
            A, B = state[f"{path}.A"].double(), state[f"{path}.B"].double()
            if f"{path}.A" in gradient:
                gradient[f"{path}.A"] = solve(B.T @ B, self.eps, gradient[f"{path}.A"])
            if f"{path}.B" in gradient:
                gradient[f"{path}.B"] = solve(A @ A.T, self.eps, gradient[f"{path}.B"].T).T
