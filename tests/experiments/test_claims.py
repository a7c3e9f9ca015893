import json
from dataclasses import replace

import numpy as np
import pytest

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import claims
from fedlora_mini.experiments.arms import arm_of, parse_arm
from fedlora_mini.experiments.claims import CLAIMS, Claim, judge, verdicts
from fedlora_mini.experiments.fewshot.arms import arm
from fedlora_mini.experiments.report import read_results, table_of
from fedlora_mini.experiments.stats import LEAST_PAIRS, Difference, paired_difference
from fedlora_mini.federation import METHODS

UP = Claim("FedSA beats FedIT.", "fedsa", "fedit", "x.jsonl", +1)


def difference(mean, spread, seeds=8):
    rng = np.random.default_rng(0)
    d = mean + spread * rng.standard_normal((seeds, 4))
    return paired_difference(d, np.zeros_like(d))


@pytest.mark.parametrize(
    ("sign", "mean", "spread", "word"),
    [
        (+1, 0.05, 0.01, "supported"),
        (+1, -0.05, 0.01, "contradicted"),
        (+1, 0.0, 0.001, "not supported"),
        (+1, 0.0, 0.2, "inconclusive"),
        (-1, -0.05, 0.01, "supported"),
        (-1, 0.05, 0.01, "contradicted"),
        (0, 0.0, 0.001, "supported"),
        (0, 0.05, 0.01, "contradicted"),
        (0, 0.0, 0.2, "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_interval(sign, mean, spread, word):
    d = difference(mean, spread)
    assert judge(replace(UP, sign=sign), d, d.p_bootstrap) == word
    few = difference(mean, spread, seeds=5)
    assert judge(replace(UP, sign=sign), few, few.p_bootstrap) == "inconclusive", "too few seeds, whatever they say"


@pytest.mark.parametrize(
    ("sign", "low", "high", "p", "word"),
    [
        (0, -0.0131, -0.0049, 0.001, "inconclusive"),  # not zero, and perhaps within the margin of 0.005
        (0, 0.0049, 0.0131, 0.001, "inconclusive"),
        (0, 0.0050, 0.0131, 0.001, "inconclusive"),  # the margin itself is not beyond it
        (0, 0.0051, 0.0131, 0.001, "contradicted"),
        (0, -0.0131, -0.0051, 0.001, "contradicted"),
        (0, 0.0051, 0.0131, 0.05, "inconclusive"),
        (0, -0.0049, 0.0049, 0.001, "supported"),
        (+1, 0.0049, 0.0131, 0.001, "supported"),  # a claim of an effect asks for its sign alone
        (-1, 0.0049, 0.0131, 0.001, "contradicted"),
    ],
)
def test_no_difference_is_contradicted_by_an_interval_beyond_the_margin_alone(sign, low, high, p, word):
    d = Difference((low + high) / 2, low, high, None, p, LEAST_PAIRS, 4)
    assert judge(replace(UP, sign=sign, margin=0.005), d, p) == word


def test_every_claim_names_methods_and_a_protocol_that_exist():
    for key, claim in CLAIMS.items():
        assert claim.sign in (-1, 0, 1), key
        if claim.shots:
            assert all(arm(name) for side in (claim.a, claim.b) for name in side.partition("@")[0].split("|")), key
        else:
            for name, file in claim.parts(claim.a) + claim.parts(claim.b):
                method, change = parse_arm(name)
                assert METHODS[method].but(**change) and arm_of({"method": method, "change": change}) == name, key
                assert f"{file}.jsonl" in claim.files, key
            assert claim.protocol in ("personal", "global", "new site", "leakage", "work", "server"), key
        assert claim.text.endswith(".") and claim.matched and claim.results.endswith(".jsonl"), key


def test_a_fall_to_zero_would_win_every_claim_that_something_falls():
    """A margin as large as the metric makes a claim that nothing can support."""
    falling = {key: claim for key, claim in CLAIMS.items() if claim.protocol == "leakage" and claim.sign < 0}
    assert {"sor-lowers-m2", "sor-lowers-m3", "sor-lowers-m7", "sor-lowers-probe"} <= falling.keys()
    for key, claim in falling.items():
        stored = read_results([claims.results_folder() / claim.results])
        assert claim.margin < 0.2 * table_of(stored, claim.b, "leakage", claim.metric).mean(), key


def result(method, seed, dice):
    scores = {"site1": {"dice": dice}, "site2": {"dice": dice + 0.01}}
    return {"event": "result", "config": {"method": method, "seed": seed}, "scores": {"personal": scores}}


def test_a_card_is_computed_from_stored_runs_and_corrected_for_all_claims(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path))
    rows = [result(m, s, 0.7 + 0.1 * (m == "fedsa") + 0.001 * s) for s in range(8) for m in ("fedit", "fedsa")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = verdicts({"up": UP, "down": replace(UP, sign=-1), "missing": replace(UP, results="no.jsonl")})
    assert [found[k].word for k in ("up", "down", "missing")] == ["supported", "contradicted", "not run"]
    assert found["up"].difference.mean == pytest.approx(0.1)
    assert found["up"].p == pytest.approx(2 * found["up"].difference.p_bootstrap)
    card = found["up"]._repr_markdown_()
    assert "**supported**" in card and "FedSA-LoRA − FedIT" in card and "8 seeds × 2 sites" in card


def test_another_parts_claims_move_no_p_value(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path))
    rows = [result(m, s, 0.7 + 0.01 * (m == "fedsa") * (s % 3 - 0.5)) for s in range(8) for m in ("fedit", "fedsa")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = verdicts({"up": UP})["up"].p
    monkeypatch.setattr(Claim, "part", property(lambda claim: claim.text))
    apart = verdicts({"up": UP, "other": replace(UP, text="Another part.")})
    assert apart["up"].p == apart["other"].p == alone
    monkeypatch.setattr(Claim, "part", "one")
    assert verdicts({"up": UP, "other": UP})["up"].p == pytest.approx(2 * alone)


def test_an_arm_of_another_file_and_a_difference_of_differences(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path))
    for file, gain in (("cell_x", 0.3), ("cell_y", 0.1)):
        rows = [result(m, s, 0.5 + gain * (m == "fedsa") + 0.001 * s) for s in range(8) for m in ("fedit", "fedsa")]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    claim = replace(UP, a="fedsa - fedit", b="fedsa@cell_y - fedit@cell_y", results="cell_x.jsonl")
    found = verdicts({"interaction": claim})["interaction"]
    assert found.difference.mean == pytest.approx(0.2) and found.word == "supported"
    assert claim.title(claim.b) == "(FedSA-LoRA (y) − FedIT (y))" and claim.files == ["cell_x.jsonl", "cell_y.jsonl"]
    alone = verdicts({"alone": replace(UP, a="fedsa", b="", results="cell_x.jsonl")})["alone"]
    assert (
        alone.difference.mean == pytest.approx(0.8085)
        and "| expected | FedSA-LoRA, personal" in alone._repr_markdown_()
    )
    (tmp_path / "cell_y.jsonl").unlink()
    assert verdicts({"interaction": claim})["interaction"].word == "not run"


def test_unpaired_runs_give_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path))
    rows = [result("fedit", 0, 0.7), result("fedit", 1, 0.7), result("fedsa", 0, 0.8)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(FedloraError, match="same seeds"):
        verdicts({"up": UP})


def test_an_arm_that_a_file_does_not_hold_has_not_been_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path))
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(result("fedit", seed, 0.7)) for seed in range(3)))
    assert verdicts({"up": UP})["up"].word == "not run"


def test_an_unknown_claim_is_a_clear_error():
    with pytest.raises(FedloraError, match="Did you mean 'fedit-below-local'"):
        claims.verdict("fedit-below-locl")
