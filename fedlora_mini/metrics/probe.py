"""What leakage lets one do: tell a site from its shared update or from features (M5), lose by a swap (M6)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


def flat(updates: Sequence[Sequence[State]]) -> Tensor:
    """Shared updates by round and site as vectors: (T, K, d)."""
    return torch.stack([torch.stack([torch.cat([t.flatten() for t in s.values()]) for s in row]) for row in updates])


def site_probe(
    updates: Tensor, folds: int = 5, components: int = 16, ridge: float = 1e-3, centre: bool = True
) -> float:
    """M5: accuracy of a linear probe that tells which site made a shared update. By chance 1 / K: `site_probe_null`.

    updates: (T, K, d), one a round and site, of which the round's mean is taken off: what all sites do is no mark.
    Every fold leaves out T / folds consecutive rounds, since neighbouring ones resemble each other; a ridge regression
    of the sites' indicators on the principal components of the others' updates, `ridge` in units of the largest
    variance. With `centre=False` the rows have nothing in common: features of T images of every site, M5 (b).
    """
    T, K, _ = updates.shape
    sites = torch.arange(K).expand(1, T, K)
    return float(_accuracy(_smoothers(updates, folds, components, ridge, centre), sites))


def site_probe_null(
    updates: Tensor,
    generator: torch.Generator,
    draws: int = 200,
    folds: int = 5,
    components: int = 16,
    ridge: float = 1e-3,
    centre: bool = True,
) -> Tensor:
    """The same with the sites' names shuffled within every round: (draws,) accuracies, in the mean exactly 1 / K."""
    T, K, _ = updates.shape
    sites = torch.rand(draws, T, K, generator=generator).argsort(-1)
    return _accuracy(_smoothers(updates, folds, components, ridge, centre), sites)


def _smoothers(
    updates: Tensor, folds: int, components: int, ridge: float, centre: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rounds left out, rounds trained on, H) of every fold; H: (n_test, n_train) maps indicators to predictions."""
    T, _, d = updates.shape
    if not 2 <= folds <= T:
        raise FedloraError(f"folds must be between 2 and the number of rounds, {T}, got {folds}")
    updates, out = updates.double(), []
    if centre:
        updates = updates - updates.mean(1, keepdim=True)
    for test in torch.arange(T).tensor_split(folds):
        train = torch.tensor([t for t in range(T) if t not in test])
        X, Z = (updates[rounds].reshape(-1, d) for rounds in (train, test))  # (n_train, d), (n_test, d)
        U, sigma, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
        U, sigma, Vh = U[:, :components], sigma[:components], Vh[:components]
        gain = sigma / (sigma.square() + ridge * sigma[0].square()).clamp(min=torch.finfo(sigma.dtype).tiny)
        out.append((test, train, ((Z - X.mean(0)) @ Vh.mT * gain) @ U.mT))
    return out


def _accuracy(folds: list[tuple[Tensor, Tensor, Tensor]], sites: Tensor) -> Tensor:
    """The probe's accuracy for each labelling of (draws, T, K): (draws,). Sites are balanced, so no intercept."""
    hits = []
    for test, train, H in folds:
        indicators = torch.nn.functional.one_hot(sites[:, train].flatten(1)).double()  # (draws, n_train, K)
        hits.append((H.to(indicators) @ indicators).argmax(-1) == sites[:, test].flatten(1))
    return torch.cat(hits, 1).double().mean(1)


def swap_drop(evaluate: Callable[[State, int], float], shared: State, privates: Sequence[State]) -> Tensor:
    """M6: score of site k with its own private factors minus its mean score with each other site's: (K,).

    `evaluate(state, k)` scores a state on site k. Not alone: it also falls where nothing personal is learnt.
    """
    K = len(privates)
    table = torch.tensor([[evaluate(shared | private, k) for private in privates] for k in range(K)])
    own = table.diagonal()
    return own - (table.sum(1) - own) / (K - 1)
