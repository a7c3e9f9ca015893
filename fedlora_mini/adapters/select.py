"""min over |S| <= b of -g_R·v_R + ½ v_Rᵀ H v_R, R the directions outside S: which ones to keep once training is over.

The second-order Taylor change of the loss when v_R becomes 0, all layers' v in one vector of length d, g and H its
gradient and Hessian. SubLoRA, Gao and Tan 2025; chapter 6. Our own derivation of the projection.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora_mini import state as S
from fedlora_mini.adapters.base import adapters, call
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State
from fedlora_mini.thin import product_svd

Batches = Iterable[tuple[Tensor, Tensor]]
"""(images, masks) each."""


def directions(model: nn.Module) -> list[str]:
    """The names of all v, in the order of the layers."""
    names = [f"{path}.v" for path, adapter in adapters(model) if isinstance(adapter, Diagonal)]
    if not names:
        raise FedloraError(f"{type(model).__name__} has no layer adapted by Diagonal: there are no directions")
    return names


@torch.no_grad()
def singular_directions(model: nn.Module, state: State) -> State:
    """The same update in its singular directions: B diag(v) A = U diag(σ) Vᵀ, so that B = U, v = σ, A = Vᵀ.

    Trained directions are not orthogonal and several may say the same thing; singular ones are the fewest that say it.
    """
    out = dict(state)
    for path, adapter in adapters(model):
        if isinstance(adapter, Diagonal):
            A, v, B = (state[f"{path}.{factor}"] for factor in adapter.factors)
            U, sigma, Vh = product_svd((B * v).double(), A.double())
            for factor, value in zip(adapter.factors, (Vh, sigma, U), strict=True):
                out[f"{path}.{factor}"] = torch.zeros_like(state[f"{path}.{factor}"])
                out[f"{path}.{factor}"][tuple(slice(side) for side in value.shape)] = value.to(v.dtype)
    return out


def v_hessian(
    model: nn.Module, state: State, batches: Batches, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """g (d,) and H (d, d) of the mean loss over all images, exact, in float64; `loss(logits, y)` returns (N,).

    One double backward pass per direction and batch: for d up to some hundreds.
    """
    names = directions(model)
    sizes = [len(state[name]) for name in names]
    v = torch.cat([state[name].detach() for name in names]).requires_grad_()
    g, H = torch.zeros(len(v), dtype=torch.float64), torch.zeros(len(v), len(v), dtype=torch.float64)
    images = 0
    for x, y in batches:

        def total(v: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            seen = {**state, **dict(zip(names, v.split(sizes), strict=True))}
            return loss(call(model, seen, x), y).sum()

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            g += torch.autograd.grad(total(v), v)[0].double().cpu()
            H += torch.autograd.functional.hessian(total, v.detach()).double().cpu()
        images += len(x)
    if not images:
        raise FedloraError("a Hessian needs at least one batch")
    return g / images, (H + H.T) / (2 * images)


def project_submodular(Q: Tensor) -> Tensor:
    """The nearest symmetric matrix (Frobenius) with Q_ij >= 0 off the diagonal: negative ones become 0. (d, d).

    With Q = diag(v) H diag(v) and R = complement of S let f(S) = ΔL(all) - ΔL(R), the loss that keeping S saves.
    Keeping i on top of S saves c_i + sum_{j in R, j != i} Q_ij, c_i = -g_i v_i + ½ Q_ii. A larger S has a smaller R, so
    these savings diminish for every i and S (f is submodular) if and only if all Q_ij, i != j, are >= 0. Entries are
    constrained one by one, so the nearest matrix has each at its nearest allowed value.
    """
    return torch.where(torch.eye(len(Q), dtype=torch.bool, device=Q.device), Q, Q.clamp(min=0))


def greedy(g: Tensor, H: Tensor, v: Tensor, budget: int) -> Tensor:
    """(d,) of bool: at most `budget` directions, each time the one that saves most; it stops when none saves anything.

    On the projected Hessian. If moreover c_i >= 0 (at a minimum: g = 0, H_ii >= 0) f is monotone too, and the saving is
    at least 1 - 1/e of the best set's (Nemhauser, Wolsey and Fisher 1978).
    """
    Q = project_submodular(v[:, None] * H * v)  # (d, d)
    single = Q.diagonal()
    saves = -g * v + 0.5 * single + (Q.sum(1) - single)  # nothing is kept yet: R holds all others
    kept = torch.zeros(len(v), dtype=torch.bool)
    for _ in range(min(budget, len(v))):
        i = int(saves.masked_fill(kept, -torch.inf).argmax())
        if saves[i] <= 0:
            break
        kept[i] = True
        saves = saves - Q[i]
    return kept


def select_directions(
    model: nn.Module, state: State, batches: Batches, loss: Callable[[Tensor, Tensor], Tensor], rank: float
) -> State:
    """The update in its singular directions, v_i exactly 0 outside the chosen set: `rank` a layer in the mean, or less.

    The unit is that of AdaLoRA's final budget. `diagonal.prune` then drops what is zero.
    """
    names = directions(model)
    state = singular_directions(model, state)
    g, H = v_hessian(model, state, batches, loss)
    v = torch.cat([state[name].detach() for name in names]).double().cpu()
    kept = greedy(g, H, v, round(rank * len(names))).split([len(state[name]) for name in names])
    out = S.clone(state)
    for name, mask in zip(names, kept, strict=True):
        out[name].masked_fill_(~mask.to(out[name].device), 0.0)
    return out
