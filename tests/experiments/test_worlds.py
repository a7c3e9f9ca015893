"""Rates are chosen on worlds that are not reported, and answers are paired differences of what was asked."""

import itertools

import numpy as np
import pytest
import torch

from fedlora_mini.experiments.rotation import Regime, draw_worlds, fit
from fedlora_mini.experiments.stats import paired_difference
from fedlora_mini.experiments.worlds import (
    FLIP,
    QUESTIONS,
    REGIONS,
    TRIALS,
    TUNING,
    Question,
    answers,
    orthogonal,
    scored,
)


def test_every_arm_takes_the_rate_that_is_best_for_it_on_worlds_that_are_not_reported():
    best, seen = {"iat": 0.3, "local": 0.1}, []

    def table(worlds, arm, rate):
        seen.append((worlds, arm, rate))
        return np.full((worlds[0], 2), abs(rate - best[arm]))

    found = scored(lambda count, seed: (count, seed), table, ("iat", "local"), 5, (0.1, 0.2, 0.3), seed=7)
    assert {worlds for worlds, _, _ in seen[:-2]} == {(TRIALS, 7 + TUNING)}
    assert seen[-2:] == [((5, 7), "iat", 0.3), ((5, 7), "local", 0.1)]
    assert found["iat"].shape == (5, 2) and not found["iat"].any() and not found["local"].any()


def test_one_rate_is_taken_without_a_search():
    seen = []
    scored(lambda count, seed: seed, lambda *call: seen.append(call), ("iat", "local"), 5, 0.2, seed=7)
    assert seen == [(7, "iat", 0.2), (7, "local", 0.2)]


def test_answers_are_paired_differences_and_the_interaction_is_the_sum_of_two():
    rng, asked = np.random.default_rng(0), {}
    tables = {
        (shift, arm): rng.normal(size=(4, 3))
        for shift in ("none", "appearance", "supervision", "both")
        for arm in ("iat", "anti_iat", "fedsa", "inverse_fedsa", "fedit", "local")
    }

    def errors(shift, arms):
        asked[shift] = arms
        return {arm: tables[shift, arm] for arm in arms}

    found = answers(QUESTIONS, errors)
    assert asked["both"] == ("iat", "anti_iat", "fedsa", "local", "fedit") and asked["none"] == ("iat", "fedit")
    assert set(found) == {*QUESTIONS, "interaction"}
    assert found["both: IAT over local"] == paired_difference(tables["both", "local"], tables["both", "iat"])
    B_over_A = tables["appearance", "fedsa"] - tables["appearance", "inverse_fedsa"]
    A_over_B = tables["supervision", "inverse_fedsa"] - tables["supervision", "fedsa"]
    assert found["interaction"].mean == pytest.approx((B_over_A + A_over_B).mean())
    assert found["appearance: B over A"].mean == pytest.approx(B_over_A.mean())


def test_without_both_halves_there_is_no_interaction():
    one = dict([next(iter(FLIP.items()))]) | {"else": Question("none", "iat", "local")}
    assert set(answers(one, lambda shift, arms: {arm: np.ones((2, 2)) for arm in arms})) == set(one)


@pytest.mark.parametrize("away", [0, 1])
def test_the_penalty_is_the_squared_cosine_of_whole_changes_with_its_own_or_another_sites_drift(away):
    """By whole matrices; IAT shares B of the encoder and A of the decoder, and only these get a gradient."""
    g, shapes = torch.Generator().manual_seed(0), {"A": (2, 3, 2, 5), "B": (2, 3, 5, 2)}  # two worlds, three sites
    params, begin, drift = (
        {f"{r}.{f}": torch.randn(*shapes[f], generator=g, dtype=torch.float64) for r in REGIONS for f in "AB"}
        for _ in range(3)
    )
    expected = 0.0
    for v, k in itertools.product(range(2), range(3)):
        now, then = ({n: x[v, k] for n, x in s.items()} for s in (params, begin))
        other = {n: x[v, (k - away) % 3] for n, x in drift.items()}
        for region, shared, private in (("encoder", "B", "A"), ("decoder", "A", "B")):
            own = {f: then[f"{region}.{f}"] for f in "AB"}
            change = own | {shared: now[f"{region}.{shared}"] - own[shared]}
            kept = own | {private: other[f"{region}.{private}"]}
            one, two = (x["B"] @ x["A"] for x in (change, kept))
            expected += 0.7 * float((one * two).sum() ** 2 / (one.square().sum() * two.square().sum()))
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    value = orthogonal("iat", 0.7, away)(leaves, begin, drift)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    moved = {name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()}
    assert moved == {"encoder.B", "decoder.A"}


def test_training_follows_the_penalty_and_a_weight_of_zero_changes_nothing():
    world = draw_worlds(Regime(sites=4, samples=8, r=4), 4)
    plain, own, other = (
        fit(world, "iat", 4, rounds=6, penalty=penalty)
        for penalty in (None, orthogonal("iat", 1.0), orthogonal("iat", 1.0, 1))
    )
    assert not torch.equal(plain, own) and not torch.equal(own, other)
    assert torch.equal(plain, fit(world, "iat", 4, rounds=6, penalty=orthogonal("iat", 0.0)))
