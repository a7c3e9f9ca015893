"""The singular values of a low-rank update W = s B diag(v) A: read from its factors, and written back into them."""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.names import together
from fedlora_mini.regularizers.proximal import on_singular_values
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.state import State
from fedlora_mini.thin import product_svd


def factors(state: State, path: str) -> tuple[Tensor, Tensor]:
    """B diag(v), or B where there is no v, and A: (m, r), (r, n)."""
    B, v = state[f"{path}.B"], state.get(f"{path}.v")
    return B if v is None else B * v, state[f"{path}.A"]


def finite(B: Tensor, A: Tensor) -> bool:
    """An SVD of anything else is an error; a client that diverges shall go on and be refused by the server."""
    return bool(torch.isfinite(B).all() & torch.isfinite(A).all())


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """σ_i = u_iᵀ B A v_i with u_i and v_i held fixed: (k,), k = min(m, n, r).

    The values are exact, and so is the gradient of any smooth symmetric function of them whose slope is 0 at σ = 0,
    also where values coincide or are zero, where the backward passes of SVD and QR would divide by zero.
    """
    if not finite(B, A):
        return B.new_full((min(*B.shape, A.shape[1]),), torch.nan)
    with torch.no_grad():
        U, _, Vh = product_svd(B, A)
    return ((U.mT @ B) * (A @ Vh.mT).mT).sum(1)


def each_spectrum(term: Regularizer, state: State, context: Context) -> list[Tensor]:
    """The singular values of every layer's W, differentiable."""
    found = layers(context, term.label, LoRA, Diagonal).items()
    return [abs(layer.scaling) * singular_values(*factors(state, path)) for path, layer in found]


def threshold_(
    term: Regularizer, state: State, context: Context, moves: frozenset[str], prox: Callable[[Tensor], Tensor]
) -> None:
    """W <- W's singular vectors with the values prox(σ), written back into the factors of every layer."""
    for path, layer in layers(context, term.label, LoRA, Diagonal).items():
        names = [name for name in (f"{path}.{role}" for role in ("A", "v", "B")) if name in state]
        B, A = factors(state, path)
        if together(term, names, moves) and finite(B, A):
            s = abs(layer.scaling)
            U, sigma, Vh = on_singular_values(B, A, lambda values, s=s: prox(s * values) / s)  # type: ignore[misc]
            write = _write_balanced if f"{path}.v" not in state else _write_diagonal
            write(state, path, _slots(B, A, U, Vh), U, sigma, Vh)


def _slots(B: Tensor, A: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """For each kept singular pair its own rank direction, such that Σ (u_j · b_i)(a_i · v_j) is largest: (k,)."""
    share = (U.mT @ B) * (A @ Vh.mT).mT  # (k, r): direction i's part in σ_j
    return torch.as_tensor(linear_sum_assignment(share.cpu().numpy(), maximize=True)[1], device=B.device)


def _write_balanced(state: State, path: str, slots: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor) -> None:
    """B = U sqrt(Σ) R, A = Rᵀ sqrt(Σ) Vᵀ in the slots, so that BᵀB = AAᵀ; b_i = 0 elsewhere, and a_i as it was.

    R is the rotation that brings them nearest to the old B and A: momentum keeps its meaning. A direction with b_i = 0
    has a gradient through a_i, as at LoRA's start, and can come back.
    """
    A, B, root = state[f"{path}.A"], state[f"{path}.B"], sigma.sqrt()
    u, _, vh = torch.linalg.svd(root[:, None] * (U.mT @ B[:, slots] + Vh @ A[slots].mT))
    R = u @ vh
    B.zero_()
    B[:, slots] = (U * root) @ R
    A[slots] = R.mT @ (root[:, None] * Vh)


def _write_diagonal(state: State, path: str, slots: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor) -> None:
    """b_i = ±u_j, v_i = ±σ_j, a_i = ±v_j in the slots, signs as they were; elsewhere v_i = 0 and the rest as it was."""
    A, v, B = (state[f"{path}.{role}"] for role in ("A", "v", "B"))
    left = torch.where((U * B[:, slots]).sum(0) < 0, -1.0, 1.0).to(B)
    right = torch.where((Vh * A[slots]).sum(1) < 0, -1.0, 1.0).to(A)
    B[:, slots], A[slots] = U * left, Vh * right[:, None]
    v.zero_()
    v[slots] = left * right * sigma
