"""Audits: broken mechanisms are caught, the right one never exceeds its claim, and a little too little noise shows."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import Dense, inject, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import audit
from fedlora_mini.federation.sampling import generator
from fedlora_mini.privacy import DPSGD, Release, Seeded, epsilon

CLAIMS = [(1.0, 1.0, 4), (3.0, 1.0, 4), (3.0, 0.2, 6)]


def table(claim=3.0, q=1.0, steps=4):
    return audit.suspects(claim, q=q, steps=steps, method="gdp" if q == 1 else "rdp")


@pytest.fixture(scope="module")
def found():
    return {row["mechanism"]: row for row in audit.report(3.0)}


@pytest.mark.parametrize("name", ["no noise", "clips the batch mean", "ledger forgets"])
def test_what_is_broken_is_caught_by_each_audit(found, name):
    row = found[name]
    assert row["caught"] and min(row["many runs"], row["many runs, Gaussian"], row["one run"]) > 3.0


def test_what_is_right_is_not_caught_and_the_tight_audit_comes_near_its_claim(found):
    row = found["as it should be"]
    assert not row["caught"] and 0.6 * 3.0 < row["many runs, Gaussian"] <= 3.0
    assert 0 < row["many runs"] < row["many runs, Gaussian"] and 0 < row["one run"] <= 3.0


@pytest.mark.parametrize(("claim", "q", "steps"), CLAIMS)
def test_the_right_mechanism_exceeds_its_claim_no_more_often_than_promised(claim, q, steps):
    """Two audits at confidence 0.95, twenty times: more than five alarms have a chance of one in a hundred at most."""
    right, alarms = table(claim, q, steps)["as it should be"], 0
    for seed in range(20):
        many = audit.many_runs(right, games=1000, others=7, seed=seed)
        alarms += many.caught or audit.one_run(right, 100, seed=seed).caught
    assert alarms <= 5


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_the_tight_audit_sees_a_third_of_the_noise_missing(share):
    right = table()["as it should be"]

    def quieter(g, mechanism, expected, source):
        return audit.per_sample(g, replace(mechanism, sigma=share * mechanism.sigma), expected, source)

    assert audit.many_runs(replace(right, step=quieter), others=7).caught == (share < 1)


def test_a_forgetful_ledger_spends_the_budget_in_every_life():
    found = table(claim=2.0, steps=3)
    right, broken = found["as it should be"], found["ledger forgets"]
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
    suspect = replace(table(q=0.3, steps=1)["as it should be"], releases=400)
    silent = replace(suspect, step=audit.without_noise)
    g = torch.zeros(2, 1, 2, dtype=torch.float64)
    score = audit.watched(suspect, g, 1.0, 0)
    assert len(score.unique()) == 4
    g[:, 0, 0] = audit.LOUD
    odds = audit.watched(silent, g, 1.0, 0)[:, 0]
    assert odds[0] != odds[1], "drawn in other releases"


def test_the_same_seed_gives_the_same_verdict_and_the_guesses_are_counted():
    right = table()["as it should be"]
    first = audit.one_run(right, 60, seed=3)
    assert first == audit.one_run(right, 60, seed=3) != audit.one_run(right, 60, seed=4)
    assert first.correct <= first.guesses <= 60 and first.tight is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audit.many_runs(table()["no noise"], games=10), "multiple of 4"),
        (lambda: audit.one_run(table()["no noise"], canaries=3), "at least 10"),
    ],
)
def test_too_few_games_are_refused(call, message):
    with pytest.raises(FedloraError, match=message):
        call()
