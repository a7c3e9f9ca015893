"""A layer in an update is a pair `<path>.A` (r_k, n), `<path>.B` (m, r_k); what else travels is averaged.

The scaling s belongs to the layer, not to the client: s = alpha / r_max whatever r_k is, so that s B A keeps its size
when a pair is padded with zeros or cut.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.exchange import Rule, Update
from fedlora_mini.state import State

AnyRule = TypeVar("AnyRule", bound=Rule)


def unequal(rule: AnyRule) -> AnyRule:
    """Marks a rule that accepts clients of unequal ranks."""
    rule.unequal = True  # type: ignore[attr-defined]
    return rule


def folds(rule: AnyRule) -> AnyRule:
    """Marks a rule that changes frozen weights."""
    rule.folds = True  # type: ignore[attr-defined]
    return rule


class Pair(NamedTuple):
    """One client's factors of one layer, in float64, and its share p_k of the images."""

    p: float
    B: Tensor  # (m, r_k)
    A: Tensor  # (r_k, n)


def in_order(updates: Iterable[Update]) -> list[Update]:
    """All updates, by client: for rules that need more than one pass, or depend on the order."""
    return sorted(updates, key=lambda update: update.client)


def layers(state: Mapping[str, Tensor]) -> list[str]:
    """The paths whose pair travels. Raises if there is none, or if a layer sends one factor alone or a third one."""
    sent: dict[str, set[str]] = {}
    for name in state:
        path, _, factor = name.rpartition(".")
        sent.setdefault(path, set()).add(factor)
    paths = [path for path, own in sent.items() if own & {"A", "B"}]
    if not paths:
        raise FedloraError("a rule on products B A needs layers that send A and B; there is none")
    for path in paths:
        if sent[path] != {"A", "B"}:
            own = ", ".join(sorted(sent[path]))
            raise FedloraError(f"a rule on products B A needs A and B of a layer, and no more; '{path}' sends {own}")
    return paths


def pairs(updates: list[Update], path: str) -> list[Pair]:
    """Every client's pair of one layer."""
    total = sum(update.weight for update in updates)
    return [Pair(u.weight / total, u.state[f"{path}.B"].double(), u.state[f"{path}.A"].double()) for u in updates]


def stacked(terms: Iterable[Pair]) -> tuple[Tensor, Tensor]:
    """[p_1 B_1, …, p_K B_K] (m, R) and [A_1; …; A_K] (R, n), R = sum_k r_k: their product is sum_k p_k B_k A_k."""
    terms = list(terms)
    return torch.cat([p * B for p, B, _ in terms], dim=1), torch.cat([A for _, _, A in terms])


def means(terms: list[Pair]) -> tuple[Tensor, Tensor]:
    """B̄ (m, r) and Ā (r, n), of pairs of one rank."""
    return torch.stack([p * B for p, B, _ in terms]).sum(0), torch.stack([p * A for p, _, A in terms]).sum(0)


def widened(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[B, 0] (m, rank) and [A; 0] (rank, n): the same product."""
    missing = rank - len(A)
    if missing < 0:
        raise FedloraError(f"a pair of rank {len(A)} does not fit into the server's rank {rank}")
    return pad(B, (0, missing)), pad(A, (0, 0, 0, missing))


def product_norm(B: Tensor, A: Tensor) -> float:
    """||B A||_F = ||R_B R_Aᵀ||_F from two thin QR decompositions: exact to rounding also where the product cancels."""
    return float((torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT).norm())


def combine(updates: Iterable[Update], layer: Callable[[str, list[Pair]], State]) -> State:
    """`layer(path, pairs)` for every layer, and the weighted mean of everything else; the clients' dtype."""
    ordered = in_order(updates)
    names = S.same_names([update.state for update in ordered])
    paths = layers(ordered[0].state)
    factors = {f"{path}.{factor}" for path in paths for factor in "AB"}
    rest = [name for name in names if name not in factors]
    out = S.weighted_mean(({name: u.state[name] for name in rest}, u.weight) for u in ordered)
    for path in paths:
        dtype = ordered[0].state[f"{path}.A"].dtype
        out |= {name: value.to(dtype) for name, value in layer(path, pairs(ordered, path)).items()}
    return out
