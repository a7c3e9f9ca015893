"""Subspace leakage as a picture: one layer, K sites that share B and keep A, and what one round's mean of B took along.

Sites are vectors in a layer of M x N whose B_0 has orthonormal columns and whose A_0 has orthonormal rows. The numbers
behind them are drawn once and travel with the picture, so that the page computes the same.
"""

import math
from typing import Any

import numpy as np
import torch
import traitlets as t
from torch import Tensor

from fedlora_mini.metrics.leakage import leak_cos2, leak_explained, principal_angles
from fedlora_mini.regularizers.subspace import exact

from .base import PageWidget, load

M, N, RANKS, SITES = 12, 16, 4, 8  # the layer; the largest rank and number of sites
RATE, STEPS = 0.1, 20  # of gradient descent within the round

_rng = np.random.default_rng(17)  # with it the common part overlaps B_0 by about r / M, as random ones do in the mean
COMMON = _rng.normal(size=M * RANKS).round(2).tolist()
_own, _alike = _rng.normal(size=(SITES, RANKS**2)), _rng.normal(size=RANKS**2)
PRIVATE = (_own + _alike).round(2).flatten().tolist()  # half of what a site learns for itself, all sites learn


def start(rank: int) -> tuple[Tensor, Tensor]:
    """B_0 (M, r) and A_0 (r, N) of the round: the first r unit vectors. Other orthonormal ones are these, turned."""
    return torch.eye(M, rank, dtype=torch.float64), torch.eye(rank, N, dtype=torch.float64)


def changes_asked(theta: float, private: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    r"""δA_k (K, r, N), and D_k (K, M, r), what site k's task asks of B - B_0: $\angle(D_kA_0,B_0\delta A_k)=\theta$.

    private: X_k (K, r, r), common: C (M, r). δA_k = X_k A_0, and D_k is cos θ times B_0 X_k, a copy of what the site
    learns for itself, plus sin θ times what of C is orthogonal to it; each scaled to norm 1.
    """
    B0, A0 = start(private.shape[-1])
    own = _unit(B0 @ private)  # (K, M, r)
    rest = common - (common * own).sum((1, 2), keepdim=True) * own
    angle = math.radians(theta)
    return _unit(private) @ A0, math.cos(angle) * own + math.sin(angle) * _unit(rest)


def local_round(dA: Tensor, asked: Tensor, lam: float) -> Tensor:
    r"""$D\leftarrow D-\rho\,\nabla\big(\tfrac12\lVert D-D_k\rVert^2+\lambda\cos^2(DA_0,B_0\delta A_k)\big)$ from D = 0.

    dA: (K, r, N), asked: (K, M, r); returns (STEPS + 1, K, M, r), the sites' D = B - B_0 after each step. SOR `exact`
    with a private drift that stands still.
    """
    B0, A0 = start(dA.shape[1])
    rows = [torch.zeros_like(asked)]
    for _ in range(STEPS):
        D = rows[-1].clone().requires_grad_()
        loss = 0.5 * (D - asked).square().sum() + lam * exact(B0 + D, B0, A0, dA, eps=0.0).sum()
        rows.append(D.detach() - RATE * torch.autograd.grad(loss, D)[0])
    return torch.stack(rows)


def measure(D: Tensor, dA: Tensor) -> dict[str, Any]:
    """M2 (mean of the sites), M3, M4 and the norm of the averaged change, for the sites' D (K, M, r)."""
    B0, A0 = start(dA.shape[1])
    mean, privates = D.mean(0), [(B0, own) for own in dA]
    cosines = principal_angles(mean, B0).square().numpy()
    return {
        "leak_cos2": float(np.mean([leak_cos2((d, A0), own) for d, own in zip(D, privates, strict=True)])),
        "leak_explained": leak_explained((mean, A0), privates),
        "overlap": float(cosines.mean()) if len(cosines) else 0.0,
        "cosines": cosines,
        "drift": float(mean.norm()),
    }


def _unit(X: Tensor) -> Tensor:
    return X / X.norm(dim=(-2, -1), keepdim=True)


class SubspaceLeakage(PageWidget):
    """How much of the averaged shared change lies where sites moved by themselves, with SOR and without.

    >>> w = SubspaceLeakage(theta=60.0, lam=0.0)
    >>> round(w.result["leak_cos2"], 6), round(w.result["chance"]["overlap"], 3)
    (0.25, 0.167)
    """

    _esm = load("leakage.js")

    theta = t.Float(45.0, min=5.0, max=90.0, help="angle in degrees: private change, asked shared one").tag(sync=True)
    rank = t.Int(2, min=1, max=RANKS, help="rank r").tag(sync=True)
    sites = t.Int(4, min=2, max=SITES, help="number of sites K").tag(sync=True)
    lam = t.Float(0.3, min=0.0, max=1e3, help="weight of SOR").tag(sync=True)
    step = t.Int(12, min=1, max=STEPS, help="local steps of the round").tag(sync=True)
    common = t.List(t.Float(), COMMON, minlen=M * RANKS, maxlen=M * RANKS, help="common part, (M, RANKS)").tag(
        sync=True
    )
    private = t.List(
        t.Float(), PRIVATE, minlen=SITES * RANKS**2, maxlen=SITES * RANKS**2, help="the sites' X, (SITES, RANKS, RANKS)"
    ).tag(sync=True)

    @t.validate("theta", "lam", "common", "private")
    def _finite(self, proposal: Any) -> Any:
        if not np.all(np.isfinite(proposal["value"])):
            raise t.TraitError(f"{proposal['trait'].name} must be finite, got {proposal['value']}")
        return proposal["value"]

    @property
    def result(self) -> dict[str, Any]:
        """The numbers that the picture shows: `measure` after `step` steps, under `without` the same at λ = 0.

        `path`: leak_cos2 after 0, 1 … steps. `chance`: the values in the mean over random D, which has M r numbers and
        of which the private changes span rank Γ = min(K, r²).
        """
        r, K = self.rank, self.sites
        common = torch.tensor(self.common, dtype=torch.float64).reshape(M, RANKS)[:, :r]
        private = torch.tensor(self.private, dtype=torch.float64).reshape(SITES, RANKS, RANKS)[:K, :r, :r]
        dA, asked = changes_asked(self.theta, private, common)
        plain, held = (local_round(dA, asked, lam) for lam in (0.0, self.lam))
        chance = {"leak_cos2": 1 / (M * r), "leak_explained": min(K, r * r) / (M * r), "overlap": r / M}
        path = np.array([measure(D, dA)["leak_cos2"] for D in held])
        return measure(held[self.step], dA) | {"without": measure(plain[self.step], dA), "path": path, "chance": chance}

    def __repr__(self) -> str:
        shown = ("theta", "rank", "sites", "lam", "step")
        return f"SubspaceLeakage({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def summary(self) -> str:
        r = self.result
        return (
            f"Subspace leakage at θ = {self.theta:g}°, r = {self.rank}, K = {self.sites}, λ = {self.lam:g}: "
            f"leak_cos2 {r['leak_cos2']:.3f} (without SOR {r['without']['leak_cos2']:.3f}), "
            f"leak_explained {r['leak_explained']:.3f} ({r['without']['leak_explained']:.3f}). "
            "(The live picture needs JavaScript.)"
        )
