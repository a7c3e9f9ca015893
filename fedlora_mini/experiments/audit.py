"""Does a mechanism keep the epsilon that it claims? Games against it, by an attacker who sees every release.

A record is here the gradient that it sends, and nobody else's touches the canary's direction: no neighbours differ by
more. The suspects are the library's own clip, noise, samples and ledger, and copies of them with one thing broken. A
lower bound above the claim convicts, and so does an attack above the claim's curve; nothing acquits. Chapter 19.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.sampling import generator
from fedlora_mini.privacy import DPSGD, BudgetSpent, Ledger, Release, calibrate, clip_sum, epsilon, poisson
from fedlora_mini.privacy.audit import Point, against_curve, gaussian_bound, lower_bound, one_run_bound
from fedlora_mini.privacy.noise import Seeded, Source, add_noise

Step = Callable[[Tensor, DPSGD, float, Source], Tensor]
"""(gradients (G, N, D) of G runs, zero for who was not drawn; mechanism; expected batch; noise) -> released (G, D)."""

Counts = tuple[int, int, int, int]  # hits of members, alarms of strangers
RIGHT = "as it should be"  # the name of the one suspect that is not broken
LOUD = 1e3  # length of a canary in units of C: it costs the attacker nothing


def per_sample(g: Tensor, mechanism: DPSGD, expected: float, source: Source) -> Tensor:
    """(sum_i clip(g_i) + sigma C N(0, I)) / expected, for every run: what `DPSGD.gradient` does."""
    total = torch.func.vmap(lambda own: clip_sum({"g": own}, mechanism.C, mechanism.clipping))(g)
    return S.scale(add_noise(total, mechanism.noise_std, source), 1 / expected)["g"]


def without_noise(g: Tensor, mechanism: DPSGD, expected: float, source: Source) -> Tensor:
    """Clipped, and nothing added: somebody left the debugging setting on."""
    return per_sample(g, replace(mechanism, sigma=0.0), expected, source)


def batch_mean(g: Tensor, mechanism: DPSGD, expected: float, source: Source) -> Tensor:
    """clip(mean_i g_i) + (sigma C / expected) N(0, I): noise for clipped records, clipping for nobody.

    One record can turn the mean anywhere in the ball: the sensitivity is 2 C, not C / expected (chapter 14).
    """
    mean = g.sum(1) / expected  # (G, D)
    clipped = mean * (mechanism.C / mean.norm(dim=1, keepdim=True)).clamp(max=1.0)
    return add_noise({"g": clipped}, mechanism.noise_std / expected, source)["g"]


@dataclass(frozen=True)
class Suspect:
    """What a mechanism says of itself, and what it does in a run: `releases` times `step`.

    claim: its epsilon at delta, said to be that of the releases in `account`.
    """

    claim: float
    delta: float
    account: Release
    mechanism: DPSGD
    releases: int
    step: Step = per_sample


def allowed(mechanism: DPSGD, claim: float, delta: float, lives: int, keeps: bool, method: str = "pld") -> int:
    """How many releases a budget allows a process that runs until it is spent and is started again, `lives` times.

    keeps: whether the ledger is in the checkpoint, as it has to be.
    """
    saved, total = Ledger(claim, delta, method).asdict(), 0
    for _ in range(lives):
        ledger = Ledger.fromdict(saved) if keeps else Ledger(claim, delta, method)
        try:
            while True:
                ledger.spend(Release(mechanism.sigma, mechanism.q))
                total += 1
        except BudgetSpent:
            saved = ledger.asdict()
    return total


def suspects(
    claim: float, delta: float = 1e-5, q: float = 1.0, steps: int = 4, lives: int = 14, method: str = "pld"
) -> dict[str, Suspect]:
    """The library's mechanism, calibrated to spend (claim, delta) in so many steps at rate q, and three broken ones."""
    mechanism = DPSGD(calibrate(claim, delta, q, steps, method), q)
    kept, forgot = (allowed(mechanism, claim, delta, lives, keeps, method) for keeps in (True, False))
    right = Suspect(claim, delta, Release(mechanism.sigma, q, kept), mechanism, kept)
    return {
        RIGHT: right,
        "no noise": replace(right, step=without_noise),
        "clips the batch mean": replace(right, step=batch_mean),
        "ledger forgets": replace(right, releases=forgot),
    }


def watched(suspect: Suspect, gradients: Tensor, expected: float, seed: object) -> Tensor:
    """The attacker's score of every coordinate: log of how much likelier all releases are with a canary there. (G, D).

    gradients: (G, N, D), each record drawn anew for every release. By its own account a release gives z = N(0, sigma^2)
    without the canary and, if it was drawn, N(1, sigma^2) with it: log(1 - q + q exp((2z - 1) / 2 sigma^2)).
    """
    mechanism, (G, N, _) = suspect.mechanism, gradients.shape
    source, coins = Seeded(generator(seed, "noise")), generator(seed, "samples")
    q, two = mechanism.q, 2 * mechanism.sigma**2
    score = torch.zeros(G, gradients.shape[2], dtype=torch.float64)
    for _ in range(suspect.releases):
        drawn = torch.zeros(G * N, dtype=torch.float64)
        drawn[poisson(G * N, q, coins)] = 1.0
        released = suspect.step(gradients * drawn.view(G, N, 1), mechanism, expected, source)
        z = released * expected / mechanism.C
        odds = (2 * z - 1) / two
        score += odds if q == 1 else torch.logaddexp(torch.tensor(math.log1p(-q)), math.log(q) + odds)
    return score


@dataclass(frozen=True)
class Verdict:
    """What an audit found, all of it right together with the confidence asked.

    game: "many runs" or "one run". lower: epsilon at the suspect's delta, at least. tight: the same, for a Gaussian
    mechanism without sampling. curve: an attack's two rates beside what the suspect's account allows.
    """

    game: str
    claim: float
    lower: float
    correct: int
    guesses: int
    tight: float | None = None
    curve: Point | None = None

    @property
    def by(self) -> tuple[str, ...]:
        """What convicts: the game's lower bound, by the game's name; "curve", if the attack is above it; or nothing."""
        tests = {self.game: self.lower > self.claim, "curve": self.curve is not None and self.curve.refutes}
        return tuple(name for name, convicts in tests.items() if convicts)

    @property
    def caught(self) -> bool:
        """Whether it does not keep its claim."""
        return bool(self.by)


def many_runs(
    suspect: Suspect, games: int = 4000, others: int = 63, confidence: float = 0.95, seed: object = 0
) -> Verdict:
    """One canary, in half of the runs. Half of the games chooses the thresholds, the other half is counted.

    `lower` asks for (epsilon, delta) alone, `curve` for all that the account says: each gets half of the error. Without
    sampling `tight` is the curve's count once more, as an epsilon.
    """
    if games < 8 or games % 4:
        raise FedloraError(f"the number of games must be a multiple of 4 and at least 8, got {games}")
    share = 1 - (1 - confidence) / 2
    member = torch.arange(games) % 2 == 0
    g = torch.zeros(games, others + 1, 2, dtype=torch.float64)
    g[:, 1:, 1] = suspect.mechanism.C  # the others agree with each other, beside the canary's direction
    g[member, 0, 0] = LOUD * suspect.mechanism.C
    expected = suspect.mechanism.q * (others + 1)
    score = watched(suspect, g, expected, f"{seed}, many runs")[:, 0].numpy()
    first, kinds = np.arange(games) < games // 2, member.numpy()

    def counts(part: NDArray[np.bool_], threshold: float) -> Counts:
        inside, outside = score[part & kinds], score[part & ~kinds]
        return int((inside > threshold).sum()), len(inside), int((outside > threshold).sum()), len(outside)

    def best(worth: Callable[[Counts], float]) -> Counts:
        tried = np.unique(np.quantile(score[first], np.linspace(0.005, 0.995, 100)))
        return counts(~first, max(tried, key=lambda t: worth(counts(first, t))))

    def bound(found: Counts) -> float:
        return lower_bound(*found, delta=suspect.delta, confidence=share)

    def point(found: Counts) -> Point:
        return against_curve(*found, release=suspect.account, confidence=share)

    sure, steep = best(bound), best(lambda found: point(found).excess)
    tight = None
    if suspect.account.q == suspect.mechanism.q == 1:
        mu = gaussian_bound(*steep, confidence=share)
        tight = epsilon([Release(1 / mu)], suspect.delta, "gdp") if mu else 0.0
    hits, members, alarms, strangers = sure
    right, games = hits + strangers - alarms, members + strangers
    return Verdict("many runs", suspect.claim, bound(sure), right, games, tight, point(steep))


def one_run(suspect: Suspect, canaries: int = 1000, confidence: float = 0.95, seed: object = 0) -> Verdict:
    """One run, many canaries, each in or out by a fair coin; "in" is said of the highest scores, "out" of the lowest.

    How many guesses are made is chosen beforehand, on a run of the attacker's own. Steinke, Nasr and Jagielski 2023.
    """
    if canaries < 10:
        raise FedloraError(f"one run needs at least 10 canaries, got {canaries}")

    def guessed(seed: object) -> NDArray[np.bool_]:
        """Whether the guess about each canary is right, the surest first: of both sides in turn."""
        inside = torch.rand(canaries, generator=generator(seed, "secret"), dtype=torch.float64) < 0.5
        g = LOUD * suspect.mechanism.C * torch.diag(inside.double())[None]  # (1, canaries, canaries)
        score = watched(suspect, g, suspect.mechanism.q * canaries / 2, seed)[0]
        order = torch.argsort(score, stable=True).numpy()
        half = canaries // 2
        secret = inside.numpy()
        return np.stack([secret[order[::-1]][:half], ~secret[order][:half]], 1).ravel()

    def bound(right: NDArray[np.bool_], guesses: int) -> float:
        return one_run_bound(int(right[:guesses].sum()), guesses, canaries, suspect.delta, confidence)

    rehearsal = guessed(f"{seed}, rehearsal")
    tried = sorted({2 * round(share * (canaries // 2)) for share in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)} - {0})
    guesses = max(tried, key=lambda k: bound(rehearsal, k))
    right = guessed(f"{seed}, one run")
    return Verdict("one run", suspect.claim, bound(right, guesses), int(right[:guesses].sum()), guesses)


def report(
    claim: float,
    delta: float = 1e-5,
    q: float = 1.0,
    steps: int = 4,
    games: int = 4000,
    canaries: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    others: int = 63,
) -> list[dict[str, Any]]:
    """One row for each of `suspects`: what it claims, what the audits found, which tests convict.

    All bounds of a row share the error: with this confidence they hold together, and a mechanism that is right is not
    accused.
    """
    rows, share = [], 1 - (1 - confidence) / 2
    for name, suspect in suspects(claim, delta, q, steps).items():
        many = many_runs(suspect, games, others, share, seed)
        one = one_run(suspect, canaries, share, seed)
        assert many.curve
        by = [*many.by, *one.by]
        rows.append(
            {"mechanism": name, "claimed": claim, "releases": suspect.releases}
            | {"many runs": many.lower, "many runs, Gaussian": many.tight, "one run": one.lower}
            | {"FPR": many.curve.fpr, "TPR": many.curve.tpr, "allowed": many.curve.allowed}
            | {"by": by, "caught": bool(by)}
        )
    return rows


def convictable(suspect: Suspect, games: int, canaries: int, confidence: float = 0.95) -> bool:
    """Whether so many games could convict anyone: whether an attack that is always right would. See `report`."""
    n, one = games // 4, 1 - (1 - confidence) / 2
    many = 1 - (1 - one) / 2
    bounds = (
        lower_bound(n, n, 0, n, suspect.delta, many),
        one_run_bound(canaries, canaries, canaries, suspect.delta, one),
    )
    return max(bounds) > suspect.claim or against_curve(n, n, 0, n, suspect.account, many).refutes


def misjudged(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The mechanisms of a report that are broken and not caught, or right and accused."""
    return [row["mechanism"] for row in rows if row["caught"] == (row["mechanism"] == RIGHT)]
