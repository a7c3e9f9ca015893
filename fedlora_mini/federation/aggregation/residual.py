"""(Ā, B̄) and W_0 <- W_0 + s (sum_k p_k B_k A_k - B̄ Ā): the mean, and what it loses. FedEx-LoRA, Singhal et al. 2025."""

from collections.abc import Iterable

import torch

from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.aggregation.pairs import Pair, combine, folds, means, stacked
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State
from fedlora_mini.thin import product_svd


@folds
def residual(server: State, updates: Iterable[Update]) -> State:
    """The mean of the factors, its residual folded into W_0.

    The residual is Cov_p(B, A) = sum_k p_k (B_k - B̄)(A_k - Ā), the pairs being centred, so nothing cancels. It has at
    most (K - 1) r directions; those below the rounding of the factors are dropped (none is left of equal clients).
    """
    updates = list(updates)

    def layer(path: str, own: list[Pair]) -> State:
        B_bar, A_bar = means(own)
        U, sigma, Vh = product_svd(*stacked(Pair(p, B - B_bar, A - A_bar) for p, B, A in own))
        size = sum(float(p * B.norm() * A.norm()) for p, B, A in own)
        kept = sigma > torch.finfo(updates[0].state[f"{path}.A"].dtype).eps * size
        return {f"{path}.fold.A": Vh[kept], f"{path}.fold.B": (U * sigma)[:, kept]}

    return mean(server, updates) | combine(updates, layer)
