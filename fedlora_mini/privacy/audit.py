"""How large epsilon must be at least, by the success of an attack: the other side of the accountant's bound.

An attack says of records whether they were in the training set. If it does better than (epsilon, delta) allows, epsilon
is larger than claimed, and the mechanism or its account is broken. Chapter 19.
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, binom

from fedlora_mini.errors import FedloraError


def lower_bound(
    hits: int, members: int, alarms: int, strangers: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon that `hits` of `members` and `alarms` of `strangers` rule out: log((TPR - delta) / FPR).

    Every game is a run of its own. TPR and FPR are replaced by their one-sided Clopper and Pearson bounds, each at half
    of the error, which serve both accusations, "in" and "out". 0 if nothing is ruled out. Jagielski et al. 2020.
    """
    for name, some, of in (("hits", hits, members), ("alarms", alarms, strangers)):
        if not 0 <= some <= of or of < 1:
            raise FedloraError(f"{name} must be between 0 and {of}, of at least one game, got {some}")
    tail = (1 - _share(confidence)) / 2
    best = 0.0
    for right, of, wrong, out_of in (
        (hits, members, alarms, strangers),
        (strangers - alarms, strangers, members - hits, members),
    ):
        low = float(beta.ppf(tail, right, of - right + 1)) if right else 0.0
        high = float(beta.ppf(1 - tail, wrong + 1, out_of - wrong)) if wrong < out_of else 1.0
        if low > delta:
            best = max(best, math.log((low - delta) / high))
    return best


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
