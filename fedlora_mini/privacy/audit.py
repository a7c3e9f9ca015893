"""How large epsilon must be at least, by the success of an attack: the other side of the accountant's bound.

An attack says of records whether they were in the training set. If it does better than (epsilon, delta) allows, epsilon
is larger than claimed, and the mechanism or its account is broken. Chapter 19.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtri
from scipy.stats import binom, norm

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy.accountant import INTERVAL, Release
from fedlora_mini.privacy.loss import falling, hockey_stick

EPSILONS = 0.05 * np.sinh(np.linspace(-7, 7, 2001))  # to +-27, dense at 0: logs of the slopes of a curve's tangents
REACH = 8.0  # standard deviations, beyond which a loss counts as infinite
CELLS = 10**4  # of one release's loss, at most
TAIL = 1e-15  # mass of composed losses that is moved to infinity


def ceiling(fpr: ArrayLike, epsilon: float, delta: float = 0.0) -> NDArray[np.float64]:
    """The largest TPR that (epsilon, delta) leaves an attack with this FPR: the lesser of the two accusations' bounds.

    min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR)), and at most 1. Wasserman and Zhou 2010; Kairouz et al. 2015.
    """
    f = np.asarray(fpr, dtype=float)
    inside, outside = math.exp(epsilon) * f + delta, 1 - math.exp(-epsilon) * (1 - delta - f)
    return np.clip(np.minimum(inside, outside), 0.0, 1.0)


def gaussian_ceiling(fpr: ArrayLike, mu: float) -> NDArray[np.float64]:
    """Phi(Phi^-1(FPR) + mu): the best attack on N(0, 1) against N(mu, 1). Neyman and Pearson; Dong et al. 2022."""
    return np.asarray(norm.cdf(norm.ppf(np.asarray(fpr, dtype=float)) + mu))


def release_ceiling(fpr: ArrayLike, release: Release) -> NDArray[np.float64]:
    """The largest TPR of an attack on Gaussian releases with this FPR: min over real eps of e^eps FPR + delta(eps).

    delta(eps) is the composed releases' own, for a record that is there or is not; a threshold on the summed privacy
    loss attains the minimum. Never below the truth. `gaussian_ceiling` for q = 1. Dong et al. 2022.
    """
    f = np.asarray(fpr, dtype=float)
    if not (release.times and release.q):
        return np.clip(f, 0.0, 1.0)
    if release.sigma == 0:  # seen as soon as it is drawn once
        missed = (1 - release.q) ** release.times
        return np.clip(1 - missed + missed * f, 0.0, 1.0)
    if release.q == 1:
        return gaussian_ceiling(f, math.sqrt(release.times) / release.sigma)
    return np.clip((np.multiply.outer(f, np.exp(EPSILONS)) + _deltas(release)).min(-1), 0.0, 1.0)


@lru_cache(maxsize=64)
def _deltas(release: Release) -> NDArray[np.float64]:
    """delta at each of EPSILONS, dots connected as the accountant does, in the one direction that is played."""
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap as connect

    sigma, q = release.sigma, release.q
    top = np.logaddexp(math.log1p(-q), math.log(q) + REACH / sigma + 0.5 / sigma**2)  # the loss at z = 1 + REACH sigma
    interval = max(INTERVAL, (top - math.log1p(-q)) / CELLS)
    low, high = math.floor(math.log1p(-q) / interval) - 1, math.ceil(top / interval)
    curve = hockey_stick(np.arange(low, high + 1) * interval, sigma, q, removed=True)
    composed = connect(interval, low, high, falling(curve)).self_compose(release.times, TAIL)
    return np.asarray(composed.get_delta_for_epsilon(EPSILONS))


@dataclass(frozen=True)
class Point:
    """An attack's TPR is at least `tpr`, its FPR at most `fpr`; at that FPR the claim allows no TPR above `allowed`."""

    tpr: float
    fpr: float
    allowed: float

    @property
    def excess(self) -> float:
        """Phi^-1(TPR) - Phi^-1(allowed). Without sampling it says by how much the claim's mu is too small, at least."""
        return float(ndtri(self.tpr) - ndtri(self.allowed))

    @property
    def refutes(self) -> bool:
        """Whether the claim cannot be true."""
        return self.tpr > self.allowed


def against_curve(
    hits: int, members: int, alarms: int, strangers: int, release: Release, confidence: float = 0.95
) -> Point:
    """The counts beside the claim that no more was released than `release`: its whole curve, not one epsilon of it.

    TPR and FPR are replaced by their one-sided bounds, each at half of the error. As the ceiling grows with the FPR, a
    true claim is refuted with a chance of 1 - confidence at most.
    """
    low, high = _rates(hits, members, alarms, strangers, confidence)
    return Point(low, high, float(release_ceiling(high, release)))


def lower_bound(
    hits: int, members: int, alarms: int, strangers: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon that `hits` of `members` and `alarms` of `strangers` rule out: log((TPR - delta) / FPR).

    Every game is a run of its own. TPR and FPR are replaced by their one-sided Clopper and Pearson bounds, each at half
    of the error, which serve both accusations, "in" and "out". 0 if nothing is ruled out. Jagielski et al. 2020.
    """
    low, high = _rates(hits, members, alarms, strangers, confidence)
    best = 0.0
    for right, wrong in ((low, high), (1 - high, 1 - low)):  # who is accused of being in, and of being out
        if right > delta:
            best = max(best, math.log((right - delta) / wrong))
    return best


def gaussian_bound(hits: int, members: int, alarms: int, strangers: int, confidence: float = 0.95) -> float:
    """The largest mu that the counts rule out if the mechanism is a Gaussian one: Phi^-1(TPR) - Phi^-1(FPR).

    For claims of that form, which is any number of Gaussian releases without sampling (mu^2 = sum of 1 / sigma^2), it
    is much nearer to the truth than `lower_bound`, because it asks for the whole curve. Nasr et al. 2023. With sampling
    there is no one mu: see `against_curve`.
    """
    low, high = _rates(hits, members, alarms, strangers, confidence)
    return max(0.0, float(ndtri(low) - ndtri(high))) if low > 0 and high < 1 else 0.0


def _rates(hits: int, members: int, alarms: int, strangers: int, confidence: float) -> tuple[float, float]:
    """TPR at least, FPR at most: one-sided Clopper and Pearson bounds, each at half of the error."""
    for name, some, of in (("hits", hits, members), ("alarms", alarms, strangers)):
        if not 0 <= some <= of or of < 1:
            raise FedloraError(f"{name} must be between 0 and {of}, of at least one game, got {some}")
    tail = (1 - _share(confidence)) / 2
    low = float(betaincinv(hits, members - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(alarms + 1, strangers - alarms, 1 - tail)) if alarms < strangers else 1.0
    return low, high


def one_run_bound(correct: int, guesses: int, canaries: int, delta: float = 0.0, confidence: float = 0.95) -> float:
    """The largest epsilon that one run rules out in which `correct` of `guesses` on independent canaries were right.

    Every one of `canaries` records was put in or left out by a fair coin; the attacker may be silent on some. Under
    epsilon-privacy the number of right guesses is at most binomial with chance e^eps / (1 + e^eps); delta adds
    2 canaries delta max_i P(correct - i <= Bin < correct) / i. Steinke, Nasr and Jagielski 2023, theorem 5.2.
    """
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise FedloraError(f"0 <= correct <= guesses <= canaries is needed, got {correct}, {guesses}, {canaries}")
    error = 1 - _share(confidence)

    def excess(epsilon: float) -> float:
        return chance_of(correct, guesses, canaries, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
        if high > 1000:
            return high
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def chance_of(correct: int, guesses: int, canaries: int, epsilon: float, delta: float = 0.0) -> float:
    """At most so likely are so many right guesses if the mechanism is (epsilon, delta)-private."""
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, q))
    if not delta or not correct:
        return min(1.0, tail)
    i = np.arange(1, correct + 1)
    just_below = np.cumsum(binom.pmf(correct - i, guesses, q)) / i
    return min(1.0, tail + 2 * canaries * delta * float(just_below.max()))


def _share(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise FedloraError(f"the confidence must be in (0, 1), got {confidence}")
    return confidence
