"""Algebra of a product B A of thin factors that is never formed."""

import torch
from torch import Tensor


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U diag(σ) Vᵀ = B A without forming it: QR of both factors, SVD of the r x r core R_B R_Aᵀ. O((m + n) r²).

    B: (m, r), A: (r, n); returns (m, k), (k,), (k, n), k = min(m, n, r), σ from the largest on.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    u, sigma, vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ u, sigma, vh @ Q_A.mT
