"""λ Σ_l cos²(change of W by the shared factor, change of W by the private one): keep apart what travels and what stays.

One layer, B shared and A private: within a round W moves by (B - B_0) A_0 through the one and by B_0 δA through the
other. With A shared the same holds for the transposed layer, Wᵀ = Aᵀ Bᵀ, so that only the first case is written out.
Layers of one rank are done at once, as (L, m, r) and (L, r, n) with rows and columns of zeros, which change no value.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedlora_mini.accepted import ranges
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


def frobenius(X: Tensor, Y: Tensor) -> Tensor:
    """⟨X, Y⟩, layer by layer."""
    return (X * Y).sum((-2, -1))


def cosine2(dot: Tensor, left2: Tensor, right2: Tensor, eps: float) -> Tensor:
    """(dot / (||left|| ||right|| + eps))², or 0 while a norm is below TINY; the gradient is finite everywhere."""
    norms = left2.clamp(min=TINY**2).sqrt() * right2.clamp(min=TINY**2).sqrt()
    return torch.where(torch.minimum(left2, right2) < TINY**2, 0.0, (dot / (norms + eps)).square())


def proxy(B: Tensor, B0: Tensor, A0: Tensor, dA: Tensor, eps: float) -> Tensor:
    """cos² of P_sh = B_0ᵀ (B - B_0) and P_lo = δA A_0ᵀ, both r x r.

    ⟨P_sh, P_lo⟩ = ⟨(B - B_0) A_0, B_0 δA⟩, but the norms are the proxies' own. Gradient in the columns of B_0.
    """
    P_sh, P_lo = B0.mT @ (B - B0), dA @ A0.mT
    return cosine2(frobenius(P_sh, P_lo), frobenius(P_sh, P_sh), frobenius(P_lo, P_lo), eps)


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
    overlap = (orthonormal(D, eps).mT @ orthonormal(B0, eps)).square().sum((-2, -1)) / B.shape[-1]
    return torch.where(active, overlap, 0.0)


def orthonormal(F: Tensor, eps: float) -> Tensor:
    """Q of F = Q R, from the thin QR of F with sqrt(eps) ||F|| I below it: (…, m, r).

    The rows below give a column that has not moved a derivative, and let it count for nothing.
    """
    m, r = F.shape[-2:]
    size = F.detach().norm(dim=(-2, -1), keepdim=True)
    below = (eps**0.5 * size + TINY) * torch.eye(r, dtype=F.dtype, device=F.device)
    return torch.linalg.qr(torch.cat([F, below], -2)).Q[..., :m, :]


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
    other forms are our reconstruction (chapter 11).
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
        ranges(self, lam="[0, inf)", eps="(0, inf)")

    free = True

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"SOR {self.form}, lambda {self.lam:g}"

    def penalty(self, state: State, context: Context) -> Tensor:
        return self.lam * REDUCE[self.reduce](torch.cat(list(self._values(state, context).values())))

    def overlaps(self, state: State, context: Context) -> list[Tensor]:
        """Every layer's value, between 0 and 1."""
        values = {p: v for paths, of in self._values(state, context).items() for p, v in zip(paths, of, strict=True)}
        return [values[path] for path in (self._branches(state) if self.form == "dual" else self._shared(context))]

    def prox_(self, state: State, context: Context) -> None:
        """Changes no tensor: the private factor's drift is noted for the next step."""
        if self.form == "dual":
            return
        for block in self._blocks(context):
            block.dA = self.beta * block.dA + (1 - self.beta) * (block.private(state).detach() - block.A0)

    def _values(self, state: State, context: Context) -> dict[tuple[str, ...], Tensor]:
        """The layers' values, those of one rank in one tensor: paths -> (L,)."""
        if self.form == "dual":
            blocks = by_rank(self._branches(state), state, ("A", "A_own"))
            return {paths: self._of_branches(state, paths) for paths in blocks}
        overlap = DRIFTS[self.form]
        return {tuple(b.sides): overlap(b.shared(state), b.B0, b.A0, b.dA, self.eps) for b in self._blocks(context)}

    def _blocks(self, context: Context) -> list["Block"]:
        """Kept from step to step, with the drift."""
        if (key := f"drift {self!r}") not in context.memory:
            sides, start = self._shared(context), context.start
            blocks = [Block({p: sides[p] for p in paths}, start) for paths in by_rank(sides, start, ("A",))]
            context.memory[key] = blocks
        return context.memory[key]

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

    def _of_branches(self, state: State, paths: tuple[str, ...]) -> Tensor:
        """cos²(B A, B_own A_own)."""
        B, B_own = (pad_sequence([state[f"{p}.{f}"] for p in paths], True) for f in ("B", "B_own"))
        A, A_own = (pad_sequence([state[f"{p}.{f}"].mT for p in paths], True).mT for f in ("A", "A_own"))
        A_own, B_own = A_own.detach(), B_own.detach()
        return cosine2(inner(B, A, B_own, A_own), norm2(B, A), norm2(B_own, A_own), self.eps)


class Block:
    """Layers of one rank through a round: their start factors and the private ones' drift. sides: path -> factor."""

    def __init__(self, sides: dict[str, str], start: State) -> None:
        self.sides = sides
        self.B0, self.A0 = self.shared(start), self.private(start)  # (L, m, r), (L, r, n)
        self.dA = torch.zeros_like(self.A0)

    def shared(self, state: State) -> Tensor:
        return pad_sequence([oriented(state, path, side)[0] for path, side in self.sides.items()], batch_first=True)

    def private(self, state: State) -> Tensor:
        rows = [oriented(state, path, side)[1].mT for path, side in self.sides.items()]
        return pad_sequence(rows, batch_first=True).mT


def by_rank(paths: Iterable[str], state: State, factors: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The paths, those of equal ranks together."""
    found: dict[tuple[int, ...], list[str]] = {}
    for path in paths:
        found.setdefault(tuple(len(state[f"{path}.{factor}"]) for factor in factors), []).append(path)
    return [tuple(each) for each in found.values()]
