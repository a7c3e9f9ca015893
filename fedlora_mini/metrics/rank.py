"""How many directions an update uses: counted, and by its singular values, without forming it."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora_mini.adapters.base import Adapter, adapters
from fedlora_mini.adapters.dora import Magnitude
from fedlora_mini.state import State


class _Pair(nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.adapter.pair()  # type: ignore[operator]


@torch.no_grad()
def pairs(model: nn.Module, state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """path -> (P, Q) of every adapter with ΔW = P Q, for the factors in `state`.

    Not of DoRA and EDoRA: they scale the rows of W_0 + P Q, and ΔW has full rank.
    """
    out = {}
    for path, adapter in adapters(model):
        if hasattr(adapter, "pair") and not isinstance(adapter, Magnitude):
            own = {f"adapter.{f}": state[f"{path}.{f}"] for f in adapter.factors if f"{path}.{f}" in state}
            out[path] = functional_call(_Pair(adapter), own, ())
    return out


def singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """σ(P Q), largest first, from two thin QR decompositions and an r x r core: O((m + n) r²)."""
    return torch.linalg.svdvals(torch.linalg.qr(P.double()).R @ torch.linalg.qr(Q.double().mT).R.mT)


def direction_norms(P: Tensor, Q: Tensor) -> Tensor:
    """||p_i|| ||q_i||, the size of every rank-one term: (r,)."""
    return P.double().norm(dim=0) * Q.double().norm(dim=1)


def ranks(model: nn.Module, state: State) -> dict[str, int]:
    """path -> directions that are not exactly zero: ||v||_0 for B diag(v) A, at most r for any pair."""
    return {path: int((direction_norms(P, Q) > 0).sum()) for path, (P, Q) in pairs(model, state).items()}


def effective_rank(sigma: Tensor) -> float:
    """exp(entropy of σ / Σσ): a smooth count of the directions that matter, between 1 and r; 0 for a zero update.

    Roy and Vetterli 2007.
    """
    total = sigma.sum()
    return float(torch.special.entr(sigma / total).sum().exp()) if total > 0 else 0.0
