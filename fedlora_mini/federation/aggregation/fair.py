"""(Ā, B̄ + ΔB): ΔB brings (B̄ + ΔB) Ā close to sum_k p_k B_k A_k. LoRA-FAIR, Bian et al. 2025."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.aggregation.pairs import Pair, combine, means, product_norm, stacked
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def closed(N: Tensor, G: Tensor, B: Tensor, size: float, lam: float) -> Tensor:
    """ΔB = (M Āᵀ - B̄ G)(G + λI)⁻¹, the minimiser of ||M - (B̄ + ΔB) Ā||_F² + λ||ΔB||_F². Our ridge reading."""
    return torch.linalg.solve(G + lam * torch.eye(len(G), dtype=G.dtype, device=G.device), N - B @ G, left=False)


def objective(X: Tensor, N: Tensor, G: Tensor, B: Tensor, size: float, lam: float) -> Tensor:
    """1 - cos(M, (B̄ + X) Ā) + λ||X||_F with M = sum_k p_k B_k A_k; N = M Āᵀ, G = Ā Āᵀ, size = ||M||_F."""
    Y = B + X
    return 1 - (N * Y).sum() / (size * ((Y @ G) * Y).sum().sqrt()) + lam * X.norm()


def optimised(N: Tensor, G: Tensor, B: Tensor, size: float, lam: float) -> Tensor:
    """The paper's objective by L-BFGS from the closed form, or ΔB = 0 where that is better: a kink."""
    start = closed(N, G, B, size, lam)
    X = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [X], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def value() -> Tensor:
        solver.zero_grad()
        loss = objective(X, N, G, B, size, lam)
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(value)
    with torch.no_grad():
        return min(
            (torch.zeros_like(B), start, X.detach()),
            key=lambda X: float(objective(X, N, G, B, size, lam).nan_to_num(9)),
        )


SOLVERS = {"closed": closed, "optimised": optimised}


@dataclass(frozen=True)
class Fair:
    """The mean of the factors, B̄ corrected towards the mean product. λ > 0 holds ΔB back.

    All in thin algebra: M enters as M Āᵀ (m, r) and ||M||_F. Where a product is zero there is no cosine: ΔB = 0.
    solve: a row of SOLVERS; `optimised` is the paper's objective, `closed` a ridge regression.
    """

    lam: float = 0.01
    solve: str = "closed"
    label: ClassVar[str] = "mean, B corrected towards the mean product"

    def __post_init__(self) -> None:
        if self.solve not in SOLVERS:
            raise unknown("solver", self.solve, SOLVERS)
        if not self.lam > 0:
            raise FedloraError(f"lam must be positive, got {self.lam}")

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        updates = list(updates)

        def layer(path: str, own: list[Pair]) -> State:
            B, A = means(own)
            left, right = stacked(own)
            size = product_norm(left, right)
            if size == 0 or product_norm(B, A) == 0:
                return {}
            N, G = left @ (right @ A.mT), A @ A.mT  # (m, r), (r, r)
            return {f"{path}.B": B + SOLVERS[self.solve](N, G, B, size, self.lam)}

        return mean(server, updates) | combine(updates, layer)
