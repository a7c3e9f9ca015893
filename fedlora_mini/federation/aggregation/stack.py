"""W_0 <- W_0 + s sum_k p_k B_k A_k, exactly: the pairs are stacked, not averaged. FLoRA, Wang et al. 2024."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlora_mini.federation.aggregation.pairs import Pair, combine, stacked
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


@dataclass(frozen=True)
class Stack:
    """The stacked pairs, folded into W_0.

    B_fold = [p_1 B_1, …, p_K B_K] (m, R), A_fold = [A_1; …; A_K] (R, n), R = sum_k r_k, with the layer's own s: the
    product is the weighted mean of the products. No factor is returned: the clients start a new pair on the new W_0,
    drawn by (seed, round, layer).
    """

    seed: int = 0
    label: ClassVar[str] = "stack"
    unequal: ClassVar[bool] = True
    fresh: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        def layer(path: str, own: list[Pair]) -> State:
            B, A = stacked(own)
            return {f"{path}.fold.A": A, f"{path}.fold.B": B}

        return combine(updates, layer)
