"""λ_max(∇²L) in the adapter's parameters by products ∇²L v, and slices of L along random directions.

Nothing of size d x d is formed. Chapters 16 and 17; slices: Li et al. 2018.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora_mini.adapters.base import call
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State
from fedlora_mini.thin import product_svd

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, y) -> one number per image; L is their mean."""


def hvp(
    model: nn.Module,
    state: Mapping[str, Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    v: Mapping[str, Tensor],
    micro: int = 64,
) -> State:
    """∇²L v = ∇⟨∇L, v⟩ by two backward passes, in the tensors that v names; `micro` images are held at once."""
    if len(x) == 0:
        raise FedloraError("the mean loss of no image has no curvature")
    total = {name: torch.zeros_like(direction) for name, direction in v.items()}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for xs, ys in zip(x.split(micro), y.split(micro), strict=True):
            share = len(xs) / len(x)
            if len(xs) == 1:  # PyTorch 2.13's instance norm of one image misreads a gradient in channels-last order
                xs, ys = torch.cat([xs, xs]), torch.cat([ys, ys])
            leaves = {name: state[name].detach().requires_grad_() for name in v}
            value = share * loss(call(model, {**state, **leaves}, xs), ys).mean()
            first = torch.autograd.grad(value, list(leaves.values()), create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * v[name]).sum() for name, g in zip(leaves, first, strict=True)]).sum()
            if slope.requires_grad:  # else L is linear in all of them
                second = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
                total = {name: total[name] + h.detach() for name, h in zip(leaves, second, strict=True)}
    return total


Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue found, within `residual` of a true one; the smallest; the products that it took."""

    value: float
    residual: float
    lowest: float
    products: int


def lanczos(product: Product, start: Tensor, most: int = 50, tolerance: float = 1e-3) -> Sharpness:
    """The ends of the spectrum of a symmetric H from H q_1, H q_2 …: the eigenvalues of T = QᵀHQ approach them.

    Stops when the residual ||H u - θ u|| of the largest θ is below tolerance |θ|. θ never exceeds λ_max. Vectors are
    made orthogonal to all earlier ones, twice, without which rounding brings copies of eigenvalues.
    """
    Q = [start / start.norm()]
    alpha: list[float] = []
    beta: list[float] = []
    while True:
        w = product(Q[-1])
        if not bool(torch.isfinite(w).all()):
            raise FedloraError("the curvature is not finite: does the loss diverge at this state?")
        alpha.append(float(w @ Q[-1]))
        basis = torch.stack(Q)
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        beta.append(float(w.norm()))
        T = torch.diag(torch.tensor(alpha, dtype=torch.float64))
        for k, b in enumerate(beta[:-1]):
            T[k, k + 1] = T[k + 1, k] = b
        theta, u = torch.linalg.eigh(T)
        residual, size = beta[-1] * abs(float(u[-1, -1])), float(theta.abs().max())
        if residual <= tolerance * abs(float(theta[-1])) or beta[-1] <= 1e-12 * size or len(Q) == min(most, len(start)):
            return Sharpness(float(theta[-1]), residual, float(theta[0]), len(Q))
        Q.append(w / beta[-1])


def power_iteration(product: Product, start: Tensor, products: int = 50) -> list[float]:
    """q <- H q / ||H q|| with its Rayleigh quotients: they approach the eigenvalue of largest *modulus*, if one has it.

    At LoRA's start the largest and the smallest are often of nearly equal modulus, and this does not converge: there
    use `lanczos`.
    """
    q, values = start / start.norm(), []
    for _ in range(products):
        w = product(q)
        values.append(float(q @ w))
        if not (length := w.norm()) > 0:
            break
        q = w / length
    return values


def curvature(
    model: nn.Module, state: State, loss: Loss, x: Tensor, y: Tensor, moves: Collection[str] | None = None, **how: int
) -> tuple[Product, int]:
    """v -> ∇²L v on flat vectors in double precision, and their length. moves: the names that span them, else all."""
    names = [name for name in state if moves is None or name in moves]
    sizes = [state[name].numel() for name in names]
    if not names:
        raise FedloraError(f"curvature in no tensor: none of {list(moves or [])[:3]} is in the state")

    def product(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        v = {name: part.view(state[name].shape).to(state[name].dtype) for name, part in parts}
        out = hvp(model, state, loss, x, y, v, **how)
        return torch.cat([out[name].flatten().double() for name in names])

    return product, sum(sizes)


def lambda_max(
    model: nn.Module,
    state: State,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    moves: Collection[str] | None = None,
    most: int = 50,
    tolerance: float = 1e-3,
    micro: int = 64,
) -> Sharpness:
    """The largest eigenvalue of the Hessian of the mean loss in the state's tensors (or in `moves`).

    It is not a property of the model that the state makes: (B / c, c A) is the same model with another λ_max. Compare
    states of one history, or `balanced` ones.
    """
    product, size = curvature(model, state, loss, x, y, moves, micro=micro)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(x.device)
    return lanczos(product, start, most, tolerance)


def balanced(state: State) -> State:
    """The same products B A from factors with BᵀB = A Aᵀ = diag σ: B = U σ^½, A = σ^½ Vᵀ.

    They are unique up to a rotation of the rank's axis, which changes no eigenvalue: λ_max there belongs to B A.
    """
    out = dict(state)
    for path in [name[:-2] for name in state if name.endswith(".B") and f"{name[:-2]}.A" in state]:
        B, A = state[f"{path}.B"], state[f"{path}.A"]
        U, sigma, Vh = product_svd(B.double(), A.double())
        root, k = sigma.sqrt(), len(sigma)
        new_B, new_A = torch.zeros_like(B), torch.zeros_like(A)  # k < r where the layer is thinner than the rank
        new_B[:, :k], new_A[:k] = (U * root).to(B.dtype), (root[:, None] * Vh).to(A.dtype)
        out[f"{path}.B"], out[f"{path}.A"] = new_B, new_A
    return out


# ---------------------------------------------------------------- slices


def direction(state: State, generator: torch.Generator) -> State:
    """A random direction, each filter of it as long as the state's: rows, but columns of a factor B. Li et al. 2018.

    Without that, a slice shows how large the parameters are. What is zero does not move.
    """
    out = {}
    for name in sorted(state):
        value = state[name]
        d = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        keep = value.dim() - 1 if name.rpartition(".")[2] == "B" else 0
        axes = [axis for axis in range(value.dim()) if axis != keep or value.dim() == 1]
        out[name] = d * (value.norm(dim=axes, keepdim=True) / d.norm(dim=axes, keepdim=True))
    return out


@torch.no_grad()
def landscape(
    model: nn.Module,
    state: State,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    directions: Sequence[State],
    radii: Sequence[float],
    micro: int = 64,
) -> Tensor:
    """L(θ + Σ_j a_j d_j) for all a_j in `radii`: one axis a direction, (len(radii), …)."""
    values = []
    for steps in itertools.product(radii, repeat=len(directions)):
        moved = dict(state)
        for a, d in zip(steps, directions, strict=True):
            moved |= {name: moved[name] + a * d[name] for name in d}
        losses = [loss(call(model, moved, xs), ys) for xs, ys in zip(x.split(micro), y.split(micro), strict=True)]
        values.append(float(torch.cat(losses).mean()))
    return torch.tensor(values, dtype=torch.float64).view([len(radii)] * len(directions))
