"""The stored private runs: paired, at one budget, rates inside their grid, and the same numbers when made again."""

from pathlib import Path

import pytest

from fedlora_mini.experiments.arms import arm_of
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.private import COMMON, PARTS, curves, edges, table
from fedlora_mini.experiments.report import arms, read_results, table_of
from fedlora_mini.experiments.run import run
from fedlora_mini.privacy import Release, epsilon

RESULTS = Path(__file__).parents[2] / "results"
FILES = {path.stem.removeprefix("private_"): path for path in sorted(RESULTS.glob("private_*.jsonl"))}
RATES, SHARPNESS = FILES.pop("rates", None), FILES.pop("sharpness", None)
BUDGET = (
    "epsilon",
    "delta",
    "rounds",
    "steps",
    "batch",
    "clip",
    "dirichlet",
    "clients",
    "data",
    "size",
    "rank",
    "model",
)


@pytest.fixture(scope="module")
def stored():
    return {part: read_results([path]) for part, path in FILES.items()}


def test_the_parts_that_claims_read_are_stored():
    assert {"main", "half", "noise", "noise_half", "untrained"} <= FILES.keys() <= PARTS.keys()
    assert RATES is not None


@pytest.mark.parametrize("part", FILES)
def test_arms_are_paired_at_one_budget_and_say_what_made_them(stored, part):
    results, wanted = stored[part], COMMON | PARTS[part].settings
    assert set(arms(results)) <= set(PARTS[part].arms)
    metric = "dice" if wanted["model"] == "minisam" else "accuracy"
    assert len({table_of(results, arm, "global", metric).shape for arm in arms(results)}) == 1
    assert {r["config"]["seed"] for r in results} in (set(range(n * PARTS[part].times)) for n in (5, 8))
    for r in results:
        assert {"config", "versions", "machine", "scores", "final_sha256", "seconds"} <= r.keys() and not r["refused"]
        assert r["config"].items() <= RunConfig(**r["config"]).asdict().items()
        assert all(r["config"][name] == wanted[name] for name in BUDGET if name in wanted)
    assert len(table(results)) == len(arms(results))


@pytest.mark.parametrize("part", FILES)
def test_every_private_run_kept_its_promise(stored, part):
    for r in stored[part]:
        own, budget = r.get("privacy"), r["config"]["epsilon"]
        assert (own is None) == (budget is None and r["config"]["sigma"] is None)
        if own is None:
            continue
        steps = r["config"]["rounds"] * r["config"]["steps"]
        clients = 4 if part.startswith("nuclei") else 8
        assert own["releases"] == [steps] * clients and own["stopped"] == ""
        assert own["epsilon"] == pytest.approx(
            epsilon([Release(own["sigma"], own["q"], steps)], own["delta"]), rel=1e-3
        )
        assert budget is None or 0.99 * budget < own["epsilon"] <= budget


def test_no_best_rate_lies_at_the_edge_of_what_was_tried(stored):
    searched = read_results([RATES])
    assert {r["config"]["seed"] for r in searched} == {1000} and not edges(searched)
    found = curves(searched)
    for part, results in stored.items():
        for r in results if PARTS[part].rates else ():
            own = r["config"]
            key = own["epsilon"], own["dirichlet"], own["steps"], own["data"], own["rounds"]
            curve = found[arm_of(own), *key]
            assert len(curve) >= 5 and curve[own["lr"]] == max(curve.values())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["la_lora:filter=low-pass", "as_lora:warmup=2"])
def test_a_stored_run_made_again_gives_the_same_numbers(stored, arm, tmp_path):
    """Up to the last bits of another machine's arithmetic, and of a noise multiplier found to a thousandth."""
    old = next(r for r in stored["main"] if r["config"]["seed"] == 0 and arm_of(r["config"]) == arm)
    new = run(RunConfig(**old["config"]), tmp_path)
    assert new["bytes_up"] == old["bytes_up"] and new["trained"] == old["trained"]
    assert new["privacy"]["sigma"] == pytest.approx(old["privacy"]["sigma"], rel=2e-3)
    for site, scores in old["scores"]["global"].items():
        assert new["scores"]["global"][site]["accuracy"] == pytest.approx(scores["accuracy"], abs=0.1), site
    assert table_of([new], arm, "global", "accuracy").mean() == pytest.approx(
        table_of([old], arm, "global", "accuracy").mean(), abs=0.03
    )
    assert new["scores"]["server"]["model"]["energy"] == pytest.approx(
        old["scores"]["server"]["model"]["energy"], abs=0.05
    )


@pytest.mark.skipif(SHARPNESS is None, reason="the sharpness of stored runs is not stored")
def test_sharpness_is_stored_at_one_loss_a_seed():
    records = read_results([SHARPNESS])
    assert len(records) == 16 and set(arms(records)) == {"la_lora", "fedit"}
    for seed in range(8):
        own = [r["scores"]["server"]["model"] for r in records if r["config"]["seed"] == seed]
        assert own[0]["common_loss"] == own[1]["common_loss"]
