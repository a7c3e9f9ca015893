"""Soft-thresholding as a picture: what the l1 proximal step leaves of a spectrum, and how the steps get there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import traitlets as t

from .base import PageWidget, load

SPECTRUM = [2.4, 1.7, 1.2, 0.8, -0.6, 0.45, 0.3, -0.15]


def soft_threshold(x: np.ndarray, tau: float) -> np.ndarray:
    r"""$\xi(x,\tau)=\mathrm{sign}(x)\max(|x|-\tau,0)$, the proximal operator of $\tau\lVert\cdot\rVert_1$."""
    x = np.asarray(x, dtype=float)
    return np.sign(x) * np.maximum(np.abs(x) - tau, 0.0)


def proximal_path(v: np.ndarray, lam: float, rho: float, steps: int, start: float = 1.0) -> np.ndarray:
    r"""$w\leftarrow\xi\big(w-\rho(w-v),\ \rho\lambda\big)$ from $w=$ `start`: proximal gradient on
    $\tfrac12\lVert w-v\rVert^2+\lambda\lVert w\rVert_1$, whose minimiser is $\xi(v,\lambda)$.

    Returns (steps + 1, r), row 0 the start. ARENA's loop with the task loss replaced by its distance to a spectrum v.
    """
    v = np.asarray(v, dtype=float)
    path = np.empty((steps + 1, len(v)))
    path[0] = start
    for k in range(steps):
        path[k + 1] = soft_threshold(path[k] - rho * (path[k] - v), rho * lam)
    return path


class SoftThreshold(PageWidget):
    """A spectrum, a threshold, what survives; beside it the proximal path that converges to the survivors.

    >>> w = SoftThreshold(v=[2.0, 0.5, -0.1], tau=0.4)
    >>> w.result["rank"], round(w.result["nuclear_norm"], 6)
    (2, 1.7)
    """

    _esm = load("soft_threshold.js")

    v = t.List(t.Float(), SPECTRUM, minlen=1, help="the spectrum that the data ask for").tag(sync=True)
    tau = t.Float(0.5, min=0.0, help="threshold; the l1 weight lambda of the path").tag(sync=True)
    step = t.Int(8, min=0, help="proximal step k that the path shows").tag(sync=True)
    steps = t.Int(40, min=1, max=400, help="length of the path").tag(sync=True)
    rho = t.Float(0.1, min=1e-3, max=1.0, help="step size").tag(sync=True)
    start = t.Float(1.0, help="where every entry starts: ARENA's v = 1").tag(sync=True)

    def __init__(self, v: Sequence[float] | None = None, **traits: Any) -> None:
        super().__init__(**({} if v is None else {"v": [float(x) for x in v]}), **traits)

    @t.validate("v", "tau", "rho", "start")
    def _finite(self, proposal: Any) -> Any:
        if not np.all(np.isfinite(proposal["value"])):
            raise t.TraitError(f"{proposal['trait'].name} must be finite, got {proposal['value']}")
        return proposal["value"]

    @t.validate("step")
    def _within(self, proposal: Any) -> int:
        return min(proposal["value"], self.steps)

    @property
    def result(self) -> dict[str, Any]:
        """The numbers that the picture shows: survivors, their rank and nuclear norm; the path and its rank at `step`.

        The nuclear norm is that of B diag(xi) A with orthonormal columns in B and rows in A.
        """
        kept = soft_threshold(np.array(self.v), self.tau)
        path = proximal_path(np.array(self.v), self.tau, self.rho, self.steps, self.start)
        now = path[self.step]
        return {
            "survivors": kept,
            "rank": int(np.count_nonzero(kept)),
            "nuclear_norm": float(np.abs(kept).sum()),
            "path": path,
            "rank_at_step": int(np.count_nonzero(now)),
            "nuclear_norm_at_step": float(np.abs(now).sum()),
        }

    def summary(self) -> str:
        r = self.result
        return (
            f"Soft-thresholding at τ = {self.tau:.2f}: {r['rank']} of {len(self.v)} directions survive, "
            f"nuclear norm {r['nuclear_norm']:.2f}. (The live picture needs JavaScript.)"
        )
