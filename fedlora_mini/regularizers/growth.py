"""W <- W + s b_j a_j, one rank-one piece after the other: a layer's rank is how many it took until they were small."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import to_matrix
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context, Regularizer
from fedlora_mini.regularizers.scope import layers
from fedlora_mini.state import State


class _Layer:
    """Which piece j of a layer trains, what the others are, and how much each finished one has changed W."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        used = B.detach().any(0).nonzero()  # columns with a non-zero entry
        self.changes: list[float] = []
        self.begin(int(used.max()) + 1 if len(used) else 0, A, B)

    def begin(self, j: int, A: Tensor, B: Tensor) -> None:
        """Piece j starts: everything else keeps the value that it has now."""
        self.j, self.age, self.stopped = j, 0, j == len(A)
        self.others = [i for i in range(len(A)) if i != j]
        self.A, self.B = A.detach()[self.others].clone(), B.detach()[:, self.others].clone()
        self.before = torch.zeros_like(B[:, 0]), torch.zeros_like(A[0])  # b_j and a_j at the last check


@dataclass(frozen=True)
class Growth(Regularizer):
    """AROMA: a LoRA of rank r_max is the store; piece j (column j of B, row j of A) trains, the others stand still.

    Merging a piece into W and starting a new one is to freeze row j and column j and to go on with j + 1: the same W,
    and the same start, since an unused row of A has its random start and an unused column of B is zero. A layer's rank
    is the number of non-zero columns of B.

    Inner loop: every `check` steps the piece b a is compared with what it was. When it changed by at most `inner_tol`
    of its norm, or after `longest` steps, it is finished, and the optimiser forgets its moments. Outer loop: the layer
    stops when the merged change ||s b a|| / ||W||, averaged over the last `window` pieces, is below `outer_tol`, or
    when all r_max are used. Every layer runs its own loops. Defaults are those of the authors' code. In a federation a
    round begins a new piece, after the last non-zero column of B. Sheng et al. 2025; chapter 6.
    """

    check: int = 10
    inner_tol: float = 1e-4
    longest: int = 1000
    outer_tol: float = 1e-4
    window: int = 3
    grouped: bool = field(default=False, init=False)  # the optimiser's moments belong to all clients of a pass

    def __post_init__(self) -> None:
        for name in ("check", "longest", "window"):
            if getattr(self, name) < 1:
                raise FedloraError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"growth by rank-one pieces, tolerance {self.outer_tol:g}"

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        grown = context.memory.setdefault("growth", {})
        for path in layers(context, self.label, LoRA):
            A, B = f"{path}.A", f"{path}.B"
            if path not in grown:
                grown[path] = _Layer(state[A], state[B])
            layer = grown[path]
            if layer.stopped:
                gradient.pop(A, None)
                gradient.pop(B, None)
            if A in gradient:
                gradient[A][layer.others] = 0
            if B in gradient:
                gradient[B][:, layer.others] = 0

    def prox_(self, state: State, context: Context) -> None:
        adapters = layers(context, self.label, LoRA)
        for path, layer in context.memory.get("growth", {}).items():
            if layer.stopped:
                continue
            A, B = state[f"{path}.A"], state[f"{path}.B"]
            A[layer.others], B[:, layer.others] = layer.A, layer.B  # weight decay moves them too
            layer.age += 1
            if self._finished(layer, A, B):
                layer.changes.append(_merged_change(adapters[path], A, B, layer.j))
                recent = layer.changes[-self.window :]
                layer.begin(layer.j + 1, A, B)
                layer.stopped |= len(recent) == self.window and sum(recent) / self.window < self.outer_tol
                context.restart.update((f"{path}.A", f"{path}.B"))

    def _finished(self, layer: _Layer, A: Tensor, B: Tensor) -> bool:
        """Whether the inner loop of the layer's piece ends at this step."""
        if layer.age >= self.longest:
            return True
        if layer.age % self.check:
            return False
        (b, a), (b0, a0) = (B[:, layer.j].clone(), A[layer.j].clone()), layer.before
        layer.before = b, a
        db, da = b - b0, a - a0  # b a - b0 a0 = db a + b0 da
        change = (db @ db) * (a @ a) + (b0 @ b0) * (da @ da) + 2 * (db @ b0) * (a @ da)
        return bool(change.clamp(min=0).sqrt() <= self.inner_tol * b0.norm() * a0.norm())


def _merged_change(adapter: Any, A: Tensor, B: Tensor, j: int) -> float:
    """||s b_j a_j|| / ||W_0 + s sum_{i<j} b_i a_i||, Frobenius norms from thin products."""
    W, s, P, Q = to_matrix(adapter.base, adapter.frozen()), adapter.scaling, B[:, :j], A[:j]
    square = torch.linalg.vector_norm(W) ** 2 + 2 * s * ((Q @ W.T) * P.T).sum() + s**2 * ((P.T @ P) * (Q @ Q.T)).sum()
    return float(s * B[:, j].norm() * A[j].norm() / square.sqrt())
