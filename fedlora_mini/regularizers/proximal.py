"""prox_{τf}(x) = argmin_z ½ ||z - x||² + τ f(z), in closed form. Pure functions on tensors; what is cut is exactly 0.0.

Parikh and Boyd 2014. A NaN stays a NaN, so that a client that diverges is seen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError
from fedlora_mini.thin import product_svd


def soft_threshold(x: Tensor, tau: float | Tensor) -> Tensor:
    """ξ(x, τ) = sign(x) max(|x| - τ, 0), f = ||·||_1: x minus its projection on [-τ, τ]."""
    bound = torch.as_tensor(tau, dtype=x.dtype, device=x.device)
    return x - torch.clamp(x, -bound, bound)


def weighted_soft_threshold(x: Tensor, tau: float, metric: Tensor) -> Tensor:
    """argmin_z ½ Σ_i d_i (z_i - x_i)² + τ ||z||_1 = ξ(x, τ / d): the same in the metric d > 0 of a diagonal scaling."""
    return soft_threshold(x, tau / metric)


def group_soft_threshold(x: Tensor, tau: float, dim: int) -> Tensor:
    """max(1 - τ / ||x_g||, 0) x_g, f = Σ_g ||x_g||: the groups g run along `dim`. Yuan and Lin 2006."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return torch.where(norm <= tau, 0.0, x * (1 - tau / norm))


def shrink(x: Tensor, tau: float) -> Tensor:
    """x / (1 + τ), f = ½ ||·||²: weight decay."""
    return x / (1 + tau)


def l1_minus_l2(x: Tensor, tau: float, alpha: float = 1.0, ridge: float = 0.0) -> Tensor:
    """f = ||·||_1 - α ||·||_2 + ½ ridge ||·||²; x: (r,), α <= 1.

    The quadratic part only rescales: x and τ are divided by 1 + τ ridge. Then, with z = ξ(x, τ),

    - z ≠ 0:  z max(1 + α τ / ||z||, 0), which for α < 0 may be zero;
    - z = 0:  only the largest entry is left, as sign(x_i) max(|x_i| - (1 - α) τ, 0).

    For α = 1 the largest entry is never cut: f is zero on vectors with one entry. Lou and Yan 2018 for α >= 0; a
    negative α is the sum of both norms, which is convex.
    """
    if alpha > 1:
        raise FedloraError(f"alpha must be at most 1, got {alpha}: beyond it the penalty is negative")
    x, tau = x / (1 + tau * ridge), tau / (1 + tau * ridge)
    z = soft_threshold(x, tau)
    norm = torch.linalg.vector_norm(z)
    if norm == 0:
        i = x.abs().argmax()
        z[i] = soft_threshold(x[i], (1 - alpha) * tau)
        return z
    return z * (1 + alpha * tau / norm).clamp(min=0.0)


def on_singular_values(B: Tensor, A: Tensor, prox: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The prox of f(singular values of B A), from the vector prox of f: U, σ' = prox(σ) and Vᵀ, without the zeros.

    For f = ||·||_1 it is the nuclear norm's: Cai, Candès and Shen 2010. Needs a prox that keeps the order of σ.
    """
    U, sigma, Vh = product_svd(B, A)
    sigma = prox(sigma)
    k = int((sigma > 0).sum())
    return U[:, :k], sigma[:k], Vh[:k]
