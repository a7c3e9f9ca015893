"""Audits: broken mechanisms are caught, the right one never exceeds its claim, and a little too little noise shows."""

import math
from collections import OrderedDict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from fedlora_mini.adapters import Dense, inject, trainable
from fedlora_mini.cli import main
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import audit
from fedlora_mini.federation.sampling import generator
from fedlora_mini.privacy import DPSGD, Release, Seeded, epsilon
from fedlora_mini.privacy.audit import against_curve, gaussian_bound, gaussian_ceiling, release_ceiling

BROKEN = ("no noise", "clips the batch mean", "ledger forgets")
OTHERS = {"no noise": 3, "clips the batch mean": 31, "ledger forgets": 3}  # only a mean depends on them
CLAIMS = [(claim, q, steps) for q, steps in ((1.0, 4), (0.2, 6)) for claim in (1.0, 3.0, 8.0)]


@cache
def table(claim=3.0, q=1.0, steps=4):
    return audit.suspects(claim, q=q, steps=steps, method="gdp" if q == 1 else "rdp")


@pytest.fixture(scope="module")
def found():
    return {row["mechanism"]: row for row in audit.report(3.0, canaries=500, others=15)}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_caught_by_each_audit(found, name):
    row = found[name]
    assert row["by"] == ["many runs", "curve", "one run"]
    assert row["caught"] and min(row["many runs"], row["many runs, Gaussian"], row["one run"]) > 3.0


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(("claim", "q", "steps"), CLAIMS)
def test_what_is_broken_is_above_the_curve_of_any_claim_with_sampling_and_without(claim, q, steps, name):
    found = audit.many_runs(table(claim, q, steps)[name], others=OTHERS[name], confidence=0.975)
    assert "curve" in found.by and found.curve.tpr > found.curve.allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(("claim", "q", "steps"), CLAIMS)
def test_it_is_so_in_every_one_of_twenty_seeds(claim, q, steps, name):
    suspect = table(claim, q, steps)[name]
    found = [audit.many_runs(suspect, others=OTHERS[name], confidence=0.975, seed=seed).by for seed in range(20)]
    assert all("curve" in by for by in found)
    assert claim < 8 or not any("many runs" in by for by in found), "4,000 games prove no epsilon of 8"


def test_what_is_right_is_not_caught_and_the_tight_audit_comes_near_its_claim(found):
    row = found[audit.RIGHT]
    assert not row["caught"] and 0.6 * 3.0 < row["many runs, Gaussian"] <= 3.0
    assert 0 < row["many runs"] < row["many runs, Gaussian"] and 0 < row["one run"] <= 3.0


@pytest.mark.parametrize(("claim", "q", "steps"), CLAIMS)
def test_the_right_mechanism_exceeds_its_claim_no_more_often_than_promised(claim, q, steps):
    """Two audits at confidence 0.95, twenty times: more than five alarms have a chance of one in a hundred at most."""
    right, alarms = table(claim, q, steps)[audit.RIGHT], 0
    for seed in range(20):
        many = audit.many_runs(right, games=1000, others=3, seed=seed)
        alarms += many.caught or audit.one_run(right, 100, seed=seed).caught
    assert alarms <= 5


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "q", "steps"), CLAIMS)
def test_the_curve_accuses_the_right_one_in_less_than_one_of_forty_audits(claim, q, steps):
    """Half of the error of 0.05 is the curve's. It needs less: to accuse, counts have to be off by both margins."""
    right = table(claim, q, steps)[audit.RIGHT]
    accused = ["curve" in audit.many_runs(right, games=1000, others=3, seed=seed).by for seed in range(100)]
    assert sum(accused) / 100 < 1 / 40


@pytest.mark.parametrize("share", [1.0, 0.7])
@pytest.mark.parametrize(("q", "steps", "games"), [(1.0, 4, 4000), (0.2, 6, 20_000)])
def test_the_tight_audit_sees_a_third_of_the_noise_missing(share, q, steps, games):
    right = table(3.0, q, steps)[audit.RIGHT]

    def quieter(g, mechanism, expected, source):
        return audit.per_sample(g, replace(mechanism, sigma=share * mechanism.sigma), expected, source)

    found = audit.many_runs(replace(right, step=quieter), games, others=7)
    assert found.by == (("curve",) if share < 1 else ())


def score(sigma, q, T, n, rng):
    """The best attack's score of n games without the record and n with it: (2, n)."""
    z = sigma * rng.standard_normal((2, n, T))
    z[1] += rng.random((n, T)) < q
    return np.log1p(q * np.expm1((2 * z - 1) / (2 * sigma**2))).sum(-1)


@pytest.mark.parametrize(("sigma", "q"), [(0.4, 0.01), (0.7, 0.2), (1.2, 0.2), (1.0, 0.999)])
def test_the_curve_of_one_sampled_release_is_a_mixture_s(sigma, q):
    z = np.linspace(-5 * sigma, 1 + 6 * sigma, 2001)
    alarms, shifted = norm.sf(z / sigma), norm.sf((z - 1) / sigma)
    gap = release_ceiling(alarms, Release(sigma, q)) - ((1 - q) * alarms + q * shifted)
    assert gap.min() > -1e-12 and gap.max() < 6e-4


@pytest.mark.parametrize(("claim", "q", "steps"), CLAIMS)
def test_the_curve_of_many_releases_is_that_of_the_best_attack(claim, q, steps):
    n, sigma = 100_000, table(claim, q, steps)[audit.RIGHT].mechanism.sigma
    outside, inside = score(sigma, q, steps, n, np.random.default_rng(0))
    for fpr in (0.003, 0.03, 0.3, 0.9):
        hits = (inside > np.quantile(outside, 1 - fpr)).mean()
        allowed = release_ceiling(fpr, Release(sigma, q, steps))
        slope = (release_ceiling(1.01 * fpr, Release(sigma, q, steps)) - allowed) / (0.01 * fpr)
        error = math.hypot(math.sqrt(allowed * (1 - allowed) / n), slope * math.sqrt(fpr * (1 - fpr) / n))
        assert abs(hits - allowed) < 4 * error


def test_without_sampling_the_curve_is_a_gaussian_s_and_the_excess_that_of_mu():
    release, mu = Release(2.5, 1.0, 4), 2 / 2.5
    assert release_ceiling(0.1, release) == gaussian_ceiling(0.1, mu)
    assert release_ceiling(0.1, replace(release, q=1 - 1e-9)) == pytest.approx(gaussian_ceiling(0.1, mu), abs=1e-5)
    counts = (700, 1000, 200, 1000)
    assert against_curve(*counts, release).excess == pytest.approx(gaussian_bound(*counts) - mu)


def test_a_true_account_is_refuted_no_more_often_than_promised():
    n, told, rng, refuted = 300, Release(0.8, 0.2, 6), np.random.default_rng(5), 0
    for _ in range(400):
        hits, alarms = (int((s > 0.3).sum()) for s in reversed(score(told.sigma, told.q, told.times, n, rng)))
        refuted += against_curve(hits, n, alarms, n, told, 0.9).refutes
    assert refuted / 400 < 0.1 + 3 * math.sqrt(0.09 / 400)


def test_batches_in_a_known_order_are_above_the_curve_of_sampled_ones():
    right = audit.suspects(3.0, q=0.1, steps=20, lives=1, method="rdp")[audit.RIGHT]
    ordered = replace(right, mechanism=replace(right.mechanism, q=1.0), releases=2)
    assert audit.many_runs(ordered, others=7).by == ("curve",) and not audit.many_runs(right, others=7).caught


def test_a_forgetful_ledger_spends_the_budget_in_every_life():
    found = table(claim=2.0, steps=3)
    right, broken = found[audit.RIGHT], found["ledger forgets"]
    assert (right.releases, broken.releases) == (3, 14 * 3)
    spent = [epsilon([Release(s.mechanism.sigma, 1.0, s.releases)], s.delta, "gdp") for s in (right, broken)]
    assert spent[0] <= 2.0 < 3 * 2.0 < spent[1]


def test_a_suspect_s_step_is_the_library_s_private_gradient():
    """A linear network whose per-sample gradient is the image itself, so that records are gradients."""
    model = inject(
        nn.Sequential(OrderedDict(layer=nn.Linear(6, 1, bias=False))), Dense, lambda path, _: path == "layer"
    )
    x, mechanism = torch.randn(9, 6, generator=generator("x")), DPSGD(0.7, 0.3, 1.2, micro=4)
    source = Seeded(generator("noise"))
    theirs = mechanism.gradient(model, trainable(model), lambda out, _: out[:, 0], x, torch.zeros(9), 30, source)
    mine = audit.per_sample(x[None], mechanism, 0.3 * 30, Seeded(generator("noise")))
    assert torch.allclose(mine, theirs["layer.D"], atol=1e-6)


def test_every_run_and_every_coordinate_has_noise_of_its_own_and_samples_of_its_own():
    suspect = replace(table(q=0.3, steps=1)[audit.RIGHT], releases=400)
    silent = replace(suspect, step=audit.without_noise)
    g = torch.zeros(2, 1, 2, dtype=torch.float64)
    score = audit.watched(suspect, g, 1.0, 0)
    assert len(score.unique()) == 4
    g[:, 0, 0] = audit.LOUD
    odds = audit.watched(silent, g, 1.0, 0)[:, 0]
    assert odds[0] != odds[1], "drawn in other releases"


def test_the_same_seed_gives_the_same_verdict_and_the_guesses_are_counted():
    right = table()[audit.RIGHT]
    first = audit.one_run(right, 60, seed=3)
    assert first == audit.one_run(right, 60, seed=3) != audit.one_run(right, 60, seed=4)
    assert first.correct <= first.guesses <= 60 and first.tight is first.curve is None


def test_a_report_that_misjudges_is_named_and_has_the_status_of_a_failure(found, capsys, monkeypatch):
    rows = [row | {"by": [], "caught": False} for row in found.values()]
    monkeypatch.setattr(audit, "report", lambda *args, **named: rows)
    assert main(["audit"]) == 1
    assert capsys.readouterr().err.strip().endswith(", ".join(BROKEN))
    rows = [{"mechanism": name, "caught": True} for name in (audit.RIGHT, *BROKEN)]
    assert audit.misjudged(rows) == [audit.RIGHT] and not audit.misjudged(rows[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audit.many_runs(table()["no noise"], games=10), "multiple of 4"),
        (lambda: audit.one_run(table()["no noise"], canaries=3), "at least 10"),
    ],
)
def test_too_few_games_for_a_threshold_are_refused(call, message):
    with pytest.raises(FedloraError, match=message):
        call()


@pytest.mark.parametrize(("games", "canaries", "enough"), [(40, 40, False), (400, 10, True), (8, 100, True)])
def test_games_are_enough_where_guesses_that_are_all_right_convict(games, canaries, enough):
    assert audit.convictable(table()[audit.RIGHT], games, canaries) == enough
