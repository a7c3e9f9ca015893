"""Rates are chosen on worlds that are not reported, and answers are paired differences of what was asked."""

import numpy as np
import pytest

from fedlora_mini.experiments.stats import paired_difference
from fedlora_mini.experiments.worlds import FLIP, QUESTIONS, TRIALS, TUNING, Question, answers, scored


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
