"""(B, A) <- the best pair of the server's rank for sum_k p_k B_k A_k. FlexLoRA, Bai et al. 2024."""

from collections.abc import Iterable

from fedlora_mini.federation.aggregation.pairs import Pair, combine, stacked, unequal, widened
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State
from fedlora_mini.thin import product_svd


@unequal
def svd(server: State, updates: Iterable[Update]) -> State:
    """The best low-rank fit to the mean product.

    U diag(σ) Vᵀ = sum_k p_k B_k A_k from the stacked thin factors, never m x n; B = U_r diag(σ_r)^½, A = diag(σ_r)^½
    V_rᵀ with the server's r, so ||B_i|| = ||A_i||. Rows of V are orthogonal, so a client of rank r_k takes the first
    r_k directions and has its own best fit. A mean of lower rank than r is filled with zeros, in both
    factors: such a direction gets no gradient.
    """

    def layer(path: str, own: list[Pair]) -> State:
        U, sigma, Vh = product_svd(*stacked(own))
        r = len(server[f"{path}.A"])
        root = sigma[:r].sqrt()
        B, A = widened(U[:, :r] * root, root.unsqueeze(-1) * Vh[:r], r)
        return {f"{path}.A": A, f"{path}.B": B}

    return combine(updates, layer)
