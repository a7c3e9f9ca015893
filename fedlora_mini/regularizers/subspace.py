"""λ Σ_l cos²(change of W by the shared factor, change of W by the private one): keep apart what travels and what stays.

One layer, B shared and A private: within a round W moves by (B - B_0) A_0 through the one and by B_0 δA through the
other. With A shared the same holds for the transposed layer, Wᵀ = Aᵀ Bᵀ, so that only the first case is written out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.metrics.leakage import travelling
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.state import State
from fedlora_mini.thin import inner, norm2

TINY = 1e-8  # below it a norm is none, and the layer's cosine counts as 0
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"sum": torch.sum, "mean": torch.mean}


def oriented(state: Mapping[str, Tensor], path: str, shared: str) -> tuple[Tensor, Tensor]:
    """The shared factor as (m, r) and the private one as (r, n), of the layer or of its transpose."""
    B, A = state[f"{path}.B"], state[f"{path}.A"]
    return (B, A) if shared == "B" else (A.mT, B.mT)


def cosine2(dot: Tensor, left2: Tensor, right2: Tensor, eps: float) -> Tensor:
    """(dot / (||left|| ||right|| + eps))², or 0 while a norm is below TINY; the gradient is finite everywhere."""
    norms = left2.clamp(min=TINY**2).sqrt() * right2.clamp(min=TINY**2).sqrt()
    return torch.where(torch.minimum(left2, right2) < TINY**2, 0.0, (dot / (norms + eps)).square())


def proxy(B: Tensor, B0: Tensor, A0: Tensor, dA: Tensor, eps: float) -> Tensor:
    """cos² of P_sh = B_0ᵀ (B - B_0) and P_lo = δA A_0ᵀ, both r x r.

    ⟨P_sh, P_lo⟩ = ⟨(B - B_0) A_0, B_0 δA⟩, but the norms are the proxies' own. Gradient in the columns of B_0.
    """
    P_sh, P_lo = B0.mT @ (B - B0), dA @ A0.mT
    return cosine2((P_sh * P_lo).sum(), P_sh.square().sum(), P_lo.square().sum(), eps)


def exact(B: Tensor, B0: Tensor, A0: Tensor, dA: Tensor, eps: float) -> Tensor:
    """cos² of (B - B_0) A_0 and B_0 δA themselves, by thin products."""
    D = B - B0
    return cosine2(inner(D, A0, B0, dA), norm2(D, A0), norm2(B0, dA), eps)


def subspace(B: Tensor, B0: Tensor, A0: Tensor, dA: Tensor, eps: float) -> Tensor:
    """||Q_sᵀ Q_l||_F² / r, Q_s and Q_l orthonormal in the columns of B - B_0 and of B_0, where those of B_0 δA lie.

    All r directions count, each as much as the others, where a cosine is one number of r².
    """
    D = B - B0
    active = torch.minimum(norm2(D, A0), norm2(B0, dA)) >= TINY**2
    overlap = (orthonormal(D, eps).mT @ orthonormal(B0, eps)).square().sum() / B.shape[1]
    return torch.where(active, overlap, 0.0)


def orthonormal(F: Tensor, eps: float) -> Tensor:
    """Q of F = Q R, from the thin QR of F with sqrt(eps) ||F|| I below it: (m, r).

    The rows below give a column that has not moved a derivative, and let it count for nothing.
    """
    r = F.shape[1]
    below = (eps**0.5 * F.detach().norm() + TINY) * torch.eye(r, dtype=F.dtype, device=F.device)
    return torch.linalg.qr(torch.cat([F, below])).Q[: len(F)]


DRIFTS = {"proxy": proxy, "exact": exact, "subspace": subspace}


@dataclass(frozen=True)
class SOR(Regularizer):
    """Subspace orthogonality. Only shared factors get a gradient; nothing is sent for it.

    `form`: what is made orthogonal, `proxy`, `exact` or `subspace` (see there), or `dual` for adapters with two whole
    branches B A (shared) + B_own A_own (private). B_0, A_0 are those of the round's start, δ an average of the private
    factor's drift since then: δ <- beta δ + (1 - beta) (A - A_0) after every step. At B_0 = 0, the very first round,
    all is 0. `encoder`, `decoder`: the factor that travels there, (B, A) for IAT, (A, A) for FedSA. A cosine does not
    know the size of B - B_0, so the gradient goes as λ / ||B - B_0||: in a round's first steps a large λ drowns the
    task, jumps over the minimum and makes the cosine larger. Zhao et al. 2026 give the structure; the proxies and the
    other forms are our reconstruction (methods.md section 2.4).
    """

    lam: float = 0.1
    form: str = "proxy"
    beta: float = 0.9
    eps: float = 1e-8
    reduce: str = "sum"  # over layers
    encoder: str = "B"
    decoder: str = "A"

    def __post_init__(self) -> None:
        if self.form not in (*DRIFTS, "dual"):
            raise unknown("form of SOR", self.form, (*DRIFTS, "dual"))
        if self.reduce not in REDUCE:
            raise unknown("reduction over layers", self.reduce, REDUCE)
        for side in (self.encoder, self.decoder):
            if side not in ("A", "B"):
                raise unknown("shared factor", side, ("A", "B"))
        if not 0 <= self.beta < 1:
            raise FedloraError(f"beta must be in [0, 1), got {self.beta}")

    free = True

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"SOR {self.form}, lambda {self.lam:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        return self.lam * REDUCE[self.reduce](torch.stack(self.overlaps(state, context)))

    def overlaps(self, state: State, context: Context) -> list[Tensor]:
        """Every layer's value, between 0 and 1."""
        if self.form == "dual":
            return [self._of_branches(state, path) for path in self._branches(state)]
        drift, values = context.memory.get(self._key, {}), []
        for path, shared in self._shared(context).items():
            B, _ = oriented(state, path, shared)
            B0, A0 = oriented(context.start, path, shared)
            dA = drift.get(path, torch.zeros_like(A0))
            values.append(DRIFTS[self.form](B, B0, A0, dA, self.eps))
        return values

    def prox_(self, state: State, context: Context) -> None:
        """Changes no tensor: the private factor's drift is noted for the next step."""
        if self.form == "dual":
            return
        drift = context.memory.setdefault(self._key, {})
        for path, shared in self._shared(context).items():
            (_, A), (_, A0) = (oriented(s, path, shared) for s in (state, context.start))
            drift[path] = self.beta * drift.get(path, torch.zeros_like(A0)) + (1 - self.beta) * (A.detach() - A0)

    @property
    def _key(self) -> str:
        return f"drift {self!r}"

    def _shared(self, context: Context) -> dict[str, str]:
        """path -> the factor that travels."""
        found = travelling(context.keys, self.encoder, self.decoder)
        if not found:
            raise FedloraError(f"'{self.label}' needs layers of encoder or decoder with the factors A and B, no others")
        return found

    def _branches(self, state: State) -> list[str]:
        """The paths with two branches."""
        found = [name.removesuffix(".B_own") for name in state if name.endswith(".B_own")]
        if not found:
            raise FedloraError(f"'{self.label}' needs layers with the factors A, B, A_own and B_own")
        return found

    def _of_branches(self, state: State, path: str) -> Tensor:
        """cos²(B A, B_own A_own)."""
        A, B = state[f"{path}.A"], state[f"{path}.B"]
        A_own, B_own = state[f"{path}.A_own"].detach(), state[f"{path}.B_own"].detach()
        return cosine2(inner(B, A, B_own, A_own), norm2(B, A), norm2(B_own, A_own), self.eps)
