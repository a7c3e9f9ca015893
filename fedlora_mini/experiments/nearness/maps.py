"""x_k = T x: the least linear map between sites' features, its size and its rank, against r.

Images of different sites are unpaired, so no map between them is observed. Two are offered, both around the means:
the Monge map, the one of least E||T x - x||² that takes one site's covariance to the other's (Gelbrich 1990), and the
least-squares map between the class means, paired by their labels. Neither sees a map that leaves covariances, or class
means, as they are (a turn of isotropic features), so both are lower bounds. Where two sites show the same images, as
the phantom's cells do, `paired_map` is the least-squares map itself and says how much of the change is linear.

Everything is seen in the leading directions of all sites' inputs; `kept` is their share of the variance.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.chance import seeded
from fedlora_mini.data import IGNORE
from fedlora_mini.experiments.nearness.features import Rows

DIRECTIONS, ENERGY = 48, 0.99  # at most so many directions, or as many as hold this share
LEAST_ROWS = 30  # of a class at a site, for its mean
RANK_SHARE = 0.9

Numbers = dict[str, float]


def root(S: Tensor) -> Tensor:
    """S^(1/2) of a covariance."""
    values, V = torch.linalg.eigh(S)
    return (V * values.clamp(min=0).sqrt()) @ V.mT


def monge(S: Tensor, C: Tensor) -> Tensor:
    """(T - I) S^(1/2) for the Monge map T, the symmetric T >= 0 with T S T = C.

    T S^(1/2) = C^(1/2) X Yᵀ with C^(1/2) S^(1/2) = X D Yᵀ: the roots are turned onto each other, and no inverse is
    needed. Its squared norm is E||T x - x||² = tr S + tr C - 2 tr D.
    """
    a, b = root(S), root(C)
    X, _, Yh = torch.linalg.svd(b @ a)
    return b @ X @ Yh - a


def size_of(D: Tensor, energy: Tensor, r: int) -> Numbers:
    """`strength` ||D||² / energy, `rank` = directions that hold 90 % of ||D||², `within` = share of the r largest."""
    s = torch.linalg.svdvals(D).square()
    total = s.sum().clamp(min=1e-30)
    rank = int((s.cumsum(0) / total < RANK_SHARE - 1e-9).sum()) + 1
    return {"strength": float(total / energy), "rank": float(rank), "within": float(s[:r].sum() / total)}


def monge_size(a: Rows, b: Rows, r: int) -> Numbers:
    """`size_of` the Monge map from a's covariance to b's, relative to the mean of both; `mean`: the means' distance."""
    (m_a, S), (m_b, C) = ((z.mean(0), torch.cov(z.mT).reshape(z.shape[1], -1)) for z in (_flat(a), _flat(b)))
    energy = (S.trace() + C.trace()) / 2
    return size_of(monge(S, C), energy, r) | {"mean": float((m_a - m_b).square().sum() / energy)}


def class_means(rows: Rows) -> dict[int, Tensor]:
    """class -> mean of its rows, of every class that has enough of them."""
    x, y = _flat(rows), rows.y.flatten()
    return {c: x[y == c].mean(0) for c in y.unique().tolist() if c != IGNORE and (y == c).sum() >= LEAST_ROWS}


def class_size(a: Rows, b: Rows, r: int) -> Numbers:
    """`size_of` the least-squares map between the class means around their own mean, (T - I) M_a = M_b - M_a.

    `turned`: the share of the difference that the best rotation takes away (Procrustes). At most classes - 1
    directions; empty where fewer than two classes are in both.
    """
    left, right = class_means(a), class_means(b)
    common = sorted(left.keys() & right.keys())
    if len(common) < 2:
        return {}
    M, L = (torch.stack([side[c] for c in common]) for side in (left, right))  # (classes, q)
    M, L = M - M.mean(0), L - L.mean(0)
    X, _, Yh = torch.linalg.svd(M.mT @ L, full_matrices=False)
    left_over = (M @ X @ Yh - L).square().sum() / (M - L).square().sum()
    return size_of(L - M, (M.square().sum() + L.square().sum()) / 2, r) | {"turned": float(1 - left_over)}


def paired_map(a: Rows, b: Rows, r: int) -> Numbers:
    """`size_of` the least-squares map T from a's rows to b's, which show the same images at the same places.

    `linear`: the share of b that T explains; `moved`: E||b - a||² / E||a||². Around the means.
    """
    x, y = (z - z.mean(0) for z in (_flat(a), _flat(b)))
    energy = x.square().sum()
    fitted = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    left_over, moved = (fitted - y).square().sum() / y.square().sum(), (y - x).square().sum() / energy
    return size_of(fitted - x, energy, r) | {"linear": float(1 - left_over), "moved": float(moved)}


# ---------------------------------------------------------------- sites


def leading(sites: Sequence[Rows]) -> tuple[list[Rows], float]:
    """The sites' rows in the leading directions of all of them together (float64), and these directions' share."""
    x = torch.cat([_flat(site) for site in sites]).double()
    values, V = torch.linalg.eigh(torch.cov(x.mT).reshape(x.shape[1], -1))
    values, V = values.flip(0).clamp(min=0), V.flip(1)
    held = values.cumsum(0) / values.sum()
    q = min(DIRECTIONS, int((held < ENERGY).sum()) + 1)
    return [Rows(site.x.double() @ V[:, :q], site.y) for site in sites], float(held[q - 1])


def mean_of(found: Sequence[Numbers]) -> Numbers:
    """The mean of every number; empty if there is none."""
    found = [numbers for numbers in found if numbers]
    return {name: sum(f[name] for f in found) / len(found) for name in found[0]} if found else {}


def between(sites: Sequence[Rows], r: int, seed: int = 0) -> dict[str, Any]:
    """Both maps, means over all pairs of sites; as null the same between two halves of each site's images.

    A half has half the images, so that the null is about twice the noise in the pairs.
    """
    own, kept = leading(sites)
    halves = []
    for k, rows in enumerate(own):
        first, second = torch.randperm(len(rows.x), generator=seeded(f"nearness halves:{seed}:{k}")).chunk(2)
        halves.append((rows.of(first), rows.of(second)))
    out: dict[str, Any] = {"directions": own[0].x.shape[-1], "kept": kept}
    for name, size in (("monge", monge_size), ("classes", class_size)):
        out[name] = mean_of([size(a, b, r) for a, b in combinations(own, 2)])
        out[f"{name} null"] = mean_of([size(a, b, r) for a, b in halves])
    return out


def beside(sites: Sequence[Rows], twins: Sequence[Rows], r: int) -> Numbers:
    """`paired_map` from every twin to its site, which shows the same images: the mean."""
    own, _ = leading([*twins, *sites])
    return mean_of([paired_map(a, b, r) for a, b in zip(own[: len(twins)], own[len(twins) :], strict=True)])


def _flat(rows: Rows) -> Tensor:
    return rows.x.flatten(0, 1)
