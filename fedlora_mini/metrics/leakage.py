"""How far shared parameters depend on what is particular to a site: M1-M4, from thin factors, never from an m x n.

Leakage itself is the effect of a purely site-specific nuisance on shared parameters, which only a second training
without that nuisance shows (M7). What is here is cheaper and says less: every metric stands beside its value by chance.
Chapter 11; M5 and M6 are in `probe`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key, call
from fedlora_mini.losses import task_loss
from fedlora_mini.state import State
from fedlora_mini.thin import inner, norm2

Pair = tuple[Tensor, Tensor]
"""(m, r) and (r, n): the change B A of a layer's weight, never formed."""


def travelling(keys: Mapping[str, Key], encoder: str = "B", decoder: str = "A") -> dict[str, str]:
    """path -> the factor that travels, of every layer of encoder and decoder that trains A and B and nothing else."""
    factors: dict[str, set[str]] = {}
    for key in keys.values():
        factors.setdefault(key.path, set()).add(key.factor)
    sides = {"encoder": encoder, "decoder": decoder}
    regions = {key.path: key.region for key in keys.values()}
    return {path: sides[regions[path]] for path, own in factors.items() if own == {"A", "B"} and regions[path] in sides}


def changes(start: State, end: State, shared: Mapping[str, str]) -> dict[str, tuple[Pair, Pair]]:
    """path -> (change of B A by the shared factor, by the private one), to first order, without the scale s.

    B shared: (B - B_0) A_0 and B_0 (A - A_0); A shared: the other way round. `shared` is what `travelling` gives.
    """
    out = {}
    for path, factor in shared.items():
        (A0, B0), (A, B) = ((s[f"{path}.A"], s[f"{path}.B"]) for s in (start, end))
        by = {"B": (B - B0, A0), "A": (B0, A - A0)}
        out[path] = by[factor], by["A" if factor == "B" else "B"]
    return out


# ---------------------------------------------------------------- M1: coupling through the private factor


def gradients_through(
    model: nn.Module, state: State, others: Sequence[State], shared: Mapping[str, str], x: Tensor, y: Tensor
) -> list[State]:
    """s G Aᵀ of one site, and s G A'ᵀ for each A' of `others` (s BᵀG, s B'ᵀG where A travels): G is never formed.

    One backward pass: the others' private factors stand below the site's own, zeros beside the shared one, so that the
    network is the site's own, [B 0 …] [A; A'; …] = B A, and the gradient of [B 0 …] is s G [A; A'; …]ᵀ.
    """
    axes = {f"{path}.{factor}": 1 if factor == "B" else 0 for path, factor in shared.items()}  # of r in (m, r), (r, n)
    seen = dict(state)
    for name, axis in axes.items():
        private, own = name[:-1] + ("A" if axis else "B"), state[name].detach()
        seen[name] = torch.cat([own] + [torch.zeros_like(own)] * len(others), axis).requires_grad_()
        seen[private] = torch.cat([state[private], *(other[private] for other in others)], 1 - axis)
    loss = task_loss(call(model, seen, x), y).mean()
    gradients = dict(zip(axes, torch.autograd.grad(loss, [seen[name] for name in axes]), strict=True))
    parts = {name: g.chunk(1 + len(others), axes[name]) for name, g in gradients.items()}
    return [{name: of[k] for name, of in parts.items()} for k in range(1 + len(others))]


def shared_gradients(
    model: nn.Module, state: State, average: State, shared: Mapping[str, str], x: Tensor, y: Tensor
) -> tuple[State, State]:
    """s G Aᵀ and s G Āᵀ of one site. `average` holds the private factors' means."""
    own, at_average = gradients_through(model, state, [average], shared, x, y)
    return own, at_average


def leak_energy(own: Sequence[State], at_average: Sequence[State], weights: Sequence[float]) -> float:
    """M1 = ||Λ||² / (||Λ||² + ||C||²), C = Σ p_k G_k Āᵀ, Λ = Σ p_k G_k A_kᵀ - C.

    For more than one step: the sites' realised shared updates, and those of a run in which all have Ā. Misleads: it
    grows as well where ideal private factors A_k = A R_kᵀ undo the sites' rotations and all sites push the shared
    factor the same way, since Ā and with it C shrink. Read it beside `site_spread`.
    """
    common = S.mean(at_average, weights)
    leaked = _square(S.sub(S.mean(own, weights), common))
    return _share(leaked, leaked + _square(common))


def energy_null(pushes: Sequence[Sequence[State]], at_average: Sequence[State], weights: Sequence[float]) -> float:
    """M1 with other sites' private factors in the place of a site's own: pushes[k][j] = s G_k A_jᵀ.

    The mean over the K - 1 cyclic shifts of the factors among the sites. What M1 has above it is due to a gradient and
    the private factor of one and the same site; what is below comes of unequal factors alone.
    """
    K = len(pushes)
    dealt = [[pushes[k][(k + shift) % K] for k in range(K)] for shift in range(1, K)]
    return sum(leak_energy(own, at_average, weights) for own in dealt) / max(1, len(dealt))


def site_spread(updates: Sequence[State], weights: Sequence[float]) -> float:
    """M1b = Σ p_k ||S_k - S̄||² / Σ p_k ||S_k||²: 0 if all sites push the shared factors alike, 1 if they cancel."""
    p, mean = _normal(weights), S.mean(updates, weights)
    off = sum(p_k * _square(S.sub(update, mean)) for p_k, update in zip(p, updates, strict=True))
    return _share(off, sum(p_k * _square(update) for p_k, update in zip(p, updates, strict=True)))


def split_half_spread(first: Sequence[State], second: Sequence[State], weights: Sequence[float]) -> float:
    """Σ p_k (1 - p_k) ||S'_k - S''_k||² / 4 over Σ p_k ||S_k||²: the `site_spread` that sampling alone would make.

    S'_k and S''_k come from the halves of a site's data, S_k = (S'_k + S''_k) / 2 from all of it. Then Var S_k is
    E ||S'_k - S''_k||² / 4, of which S_k - S̄ keeps the part 1 - p_k where sites differ by sampling alone.
    """
    p, halves = _normal(weights), list(zip(first, second, strict=True))
    noise = sum(q * (1 - q) * _square(S.sub(a, b)) / 4 for q, (a, b) in zip(p, halves, strict=True))
    return _share(noise, sum(q * _square(S.add(a, b)) / 4 for q, (a, b) in zip(p, halves, strict=True)))


def _normal(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _square(update: State) -> float:
    return S.norm(update) ** 2


def _share(part: float, whole: float) -> float:
    """part / whole, 0 where there is nothing."""
    return part / whole if whole > 0 else 0.0


# ---------------------------------------------------------------- M2-M4: geometry of one layer's changes


def leak_cos2(shared: Pair, private: Pair) -> float:
    """M2 = cos²(ΔW_sh, ΔW_lo) of one site: what SOR `exact` trains on, so no independent evidence. 0 for a zero."""
    (B1, A1), (B2, A2) = _double(shared), _double(private)
    norms = norm2(B1, A1) * norm2(B2, A2)
    return float(inner(B1, A1, B2, A2) ** 2 / norms) if norms > 0 else 0.0


def leak_explained(shared: Pair, privates: Sequence[Pair]) -> float:
    """M3 = gᵀ Γ⁺ g / ||ΔW_sh||²: the share of the averaged shared change in the span of the K sites' private changes.

    g_k = ⟨ΔW_sh, ΔW_k⟩, Γ_jk = ⟨ΔW_j, ΔW_k⟩. By chance about K / (m n): `explained_null`.
    """
    B, A = _double(shared)
    Bs, As = (torch.stack(factors) for factors in zip(*map(_double, privates), strict=True))  # (K, m, r), (K, r, n)
    g = inner(B, A, Bs, As)  # (K,)
    gamma = inner(Bs[:, None], As[:, None], Bs, As)  # (K, K)
    size = norm2(B, A)
    return float(g @ torch.linalg.pinv(gamma, rtol=1e-10, hermitian=True) @ g / size) if size > 0 else 0.0


def explained_null(shared: Pair, privates: Sequence[Pair], generator: torch.Generator, draws: int = 200) -> Tensor:
    """`leak_explained` with rows and columns of the private changes permuted, signs drawn, all sites alike: (draws,).

    Every ⟨ΔW_j, ΔW_k⟩ and every singular value stays, only the relation to the shared change goes, also what comes of
    the common B_0 and A_0. The mean is rank(Γ) / (m n).
    """
    (m, _), (_, n) = (factor.shape for factor in shared)
    values = []
    for _ in range(draws):
        rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
        signs = [2.0 * torch.randint(2, (size,), generator=generator) - 1 for size in (m, n)]
        moved = [(signs[0].to(B)[:, None] * B[rows], A[:, columns] * signs[1].to(A)) for B, A in privates]
        values.append(leak_explained(shared, moved))
    return torch.tensor(values)


def principal_angles(F: Tensor, G: Tensor) -> Tensor:
    """M4: the cosines of the angles between the columns' spans of F: (m, r) and G: (m, r'), largest first.

    For row spaces pass Aᵀ. Directions below 1e-6 of the largest singular value are none.
    """
    return torch.linalg.svdvals(_basis(F).mT @ _basis(G)).clamp(max=1.0)


def subspace_overlap(F: Tensor, G: Tensor) -> float:
    """||Q_sᵀ Q_l||_F² / r, the mean cos² of the principal angles. By chance r / m for two spans of dimension r."""
    cosines = principal_angles(F, G)
    return float(cosines.square().mean()) if len(cosines) else 0.0


def _double(pair: Pair) -> Pair:
    return pair[0].double(), pair[1].double()


def _basis(F: Tensor) -> Tensor:
    """Orthonormal columns that span those of F: (m, rank)."""
    U, sigma, _ = torch.linalg.svd(F.double(), full_matrices=False)
    return U[:, sigma > 1e-6 * sigma.max().clamp(min=torch.finfo(sigma.dtype).tiny)]
