"""Algebra of a product B A of thin factors that is never formed."""

import torch
from torch import Tensor


def inner(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """⟨B1 A1, B2 A2⟩_F = tr((B2ᵀ B1)(A1 A2ᵀ)). O((m + n) r²).

    B1: (…, m, r1), A1: (…, r1, n), B2: (…, m, r2), A2: (…, r2, n); leading axes broadcast. Chapter 7.
    """
    return ((B2.mT @ B1) * (A2 @ A1.mT)).sum((-2, -1))  # of two (…, r2, r1)


def norm2(B: Tensor, A: Tensor) -> Tensor:
    """||B A||_F² = tr((BᵀB)(A Aᵀ)). Not below 0, where rounding would take a product that cancels."""
    return inner(B, A, B, A).clamp(min=0)


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U diag(σ) Vᵀ = B A without forming it: QR of both factors, SVD of the r x r core R_B R_Aᵀ. O((m + n) r²).

    B: (m, r), A: (r, n); returns (m, k), (k,), (k, n), k = min(m, n, r), σ from the largest on.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    u, sigma, vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ u, sigma, vh @ Q_A.mT
