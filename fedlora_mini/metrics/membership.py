"""Who was in the training set? Scores of an attack on K models and M images, and how good they are at few false alarms.

`member` (K, M) says which image each model was trained on. Every model is attacked in turn with the others as shadows.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlora_mini.errors import FedloraError

Table = NDArray[np.float64]


def confidence(loss: ArrayLike) -> Table:
    """log(p / (1 - p)) with p = exp(-loss): nearer to a normal variable than the loss is. Carlini et al. 2022."""
    loss = np.asarray(loss, dtype=float)
    return -loss - np.log(-np.expm1(-loss))


def lira(score: ArrayLike, member: ArrayLike) -> Table:
    """log N(s; mu_in, v_in) - log N(s; mu_out, v_out), image by image: (K, M). Carlini et al. 2022.

    Means and variances are those of the other K - 1 models; each variance is one number for all images, because with
    few shadows an image's own would be noise. Raises if an image lacks three models with it or three without.
    """
    s, own = np.asarray(score, dtype=float), np.asarray(member, dtype=bool)
    if s.shape != own.shape or s.ndim != 2:
        raise FedloraError(f"scores and membership must be two tables (models, images), got {s.shape}, {own.shape}")
    if min(own.sum(0).min(), (~own).sum(0).min()) < 3:
        raise FedloraError("every image needs at least three models that saw it and three that did not")
    ratio = np.zeros_like(s)
    for side, sign in ((own, 1), (~own, -1)):
        count, total = side.sum(0), np.where(side, s, 0).sum(0)  # (M,)
        mean = (total - np.where(side, s, 0)) / (count - side)  # without the model under attack
        spread = np.where(side, (s - total / count) ** 2, 0)
        gone = (spread * count / (count - 1)).sum(1)  # (K,): what each model adds to the sum of squares
        variance = (spread.sum() - gone) / ((count - 1).sum() - side.sum(1))
        ratio -= sign * ((s - mean) ** 2 / variance[:, None] + np.log(variance[:, None])) / 2
    return ratio


def roc(score: ArrayLike, member: ArrayLike) -> tuple[Table, Table]:
    """(false, true positive rates) for every threshold, from (0, 0) to (1, 1); equal scores are one threshold."""
    s, own = np.asarray(score, dtype=float).ravel(), np.asarray(member, dtype=bool).ravel()
    if own.all() or not own.any():
        raise FedloraError("a curve needs members and others")
    order = np.argsort(-s, kind="stable")
    last = np.append(np.diff(s[order]) != 0, True)
    hits, alarms = (np.cumsum(kind[order])[last] for kind in (own, ~own))
    return np.append(0.0, alarms / (~own).sum()), np.append(0.0, hits / own.sum())


def tpr_at(score: ArrayLike, member: ArrayLike, fpr: float) -> float:
    """The largest true positive rate at which no more than this share of the others is accused."""
    false, true = roc(score, member)
    return float(true[false <= fpr].max())
