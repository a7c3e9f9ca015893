"""The stored private runs: paired, at one budget, rates inside their grid, and the same numbers when made again."""

import math
from pathlib import Path

import pytest
import torch

from fedlora_mini.data import load
from fedlora_mini.experiments.arms import arm_of
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.private import (
    AS,
    COMMON,
    PARTS,
    SEARCH_SEEDS,
    STEPS,
    Searched,
    curves,
    edges,
    filtered,
    table,
)
from fedlora_mini.experiments.private_sharpness import LOOKED
from fedlora_mini.experiments.report import arms, read_results, table_of
from fedlora_mini.experiments.run import run
from fedlora_mini.privacy import Release, epsilon

RESULTS = Path(__file__).parents[2] / "results"
FILES = {path.stem.removeprefix("private_"): path for path in sorted(RESULTS.glob("private_*.jsonl"))}
RATES, SHARPNESS, SHARPNESS_HALF = (FILES.pop(name) for name in ("rates", "sharpness", "sharpness_half"))
CELLS = {(alpha, epsilon) for alpha in (0.1, 0.3, 0.5) for epsilon in (1.0, 3.0, 8.0)}
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


def test_every_arm_of_every_part_is_stored(stored):
    assert FILES.keys() == PARTS.keys()
    assert all(set(arms(results)) == set(PARTS[part].arms) for part, results in stored.items())


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_every_cell_has_every_schedule_without_and_with_every_filter(stored, data):
    """card 5.8: schedules times filters, at each epsilon and each share of labels, with their references."""
    found: dict[tuple[float, float | None], set[tuple[str, int]]] = {}
    for r in (r for results in stored.values() for r in results):
        own = r["config"]
        if own["data"] == data and own["rounds"] == 10:
            found.setdefault((own["dirichlet"], own["epsilon"]), set()).add((arm_of(own), own["steps"]))
    for alpha, budget in CELLS:
        own = found[alpha, budget]
        for name in ("fedit", "ffa", "rolora", "la_lora", "la_lora:first=A", AS):
            assert {(arm, STEPS) for arm in filtered(name)} <= own, (alpha, budget, name)
        assert {(arm, STEPS // 2) for arm in filtered("fedit")} | {("fedit:filter=doppler", STEPS)} <= own
        assert {(name, STEPS) for name in ("fedit", "ffa", "rolora", "la_lora")} <= found[alpha, None]


@pytest.mark.parametrize("part", FILES)
def test_arms_are_paired_at_one_budget_and_say_what_made_them(stored, part):
    results, wanted = stored[part], COMMON | PARTS[part].settings
    metric = "dice" if wanted["model"] == "minisam" else "accuracy"
    assert len({table_of(results, arm, "global", metric).shape for arm in arms(results)}) == 1
    assert {r["config"]["seed"] for r in results} == set(range(8 * PARTS[part].times))
    for r in results:
        assert {"config", "versions", "machine", "scores", "final_sha256", "seconds"} <= r.keys() and not r["refused"]
        assert r["config"].items() <= RunConfig(**r["config"]).asdict().items()
        assert all(r["config"][name] == wanted[name] for name in BUDGET if name in wanted)
        if PARTS[part].rates:  # where nothing is searched, nothing is read off test images: noise alone, older
            assert r["config"]["data_options"] == wanted["data_options"]
    assert len(table(results)) == len(arms(results))


@pytest.mark.parametrize("part", FILES)
def test_every_private_run_kept_its_promise(stored, part):
    for r in stored[part]:
        own, budget = r.get("privacy"), r["config"]["epsilon"]
        assert (own is None) == (budget is None and r["config"]["sigma"] is None)
        if own is None:
            continue
        steps = r["config"]["rounds"] * r["config"]["steps"]
        assert own["releases"] == [steps] * 8 and own["stopped"] == ""
        spent = epsilon([Release(own["sigma"], own["q"], steps)], own["delta"])
        assert own["epsilon"] == (math.inf if own.get("not_dp") else pytest.approx(spent, rel=1e-3))
        assert budget is None or 0.99 * budget < own["epsilon"] <= budget


@pytest.mark.slow
def test_no_best_rate_lies_at_the_edge_of_what_was_tried(stored):
    searched = read_results([RATES])
    assert not edges(searched)
    seeds: dict[Searched, set[int]] = {}
    for r in searched:
        seeds.setdefault(Searched.of(r["config"]), set()).add(r["config"]["seed"])
    assert all(each == set(SEARCH_SEEDS) for each in seeds.values())
    found = curves(searched)
    for part, results in stored.items():
        for r in results if PARTS[part].rates else ():
            curve = found[Searched.of(r["config"])]
            assert len(curve) >= 5 and curve[r["config"]["lr"]] == max(curve.values())


def test_no_test_image_has_taken_part_in_a_search(stored):
    """Of the digits here, whose pool is at hand; the same option holds MNIST's and the nuclei's test images out."""
    own = COMMON["data_options"]
    for part in (name for name, part in PARTS.items() if part.rates):
        for r in (r for r in stored[part] if r["config"]["data"] != "phantom"):
            assert r["config"]["data_options"]["test_seed"] == own["test_seed"], part
    held = {tuple(image.flatten().tolist()) for image in load("digits", seed=0, **own).sites[0].test.images}
    for seed in SEARCH_SEEDS:
        [site] = load("digits", seed=seed, **own).sites
        seen = {tuple(image.flatten().tolist()) for image in torch.cat([site.train.images, site.val.images])}
        assert not seen & held and len(site.val) == 160


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


def test_sharpness_is_stored_at_one_loss_a_seed_and_at_the_settings_of_the_study(stored):
    whole, half = read_results([SHARPNESS]), read_results([SHARPNESS_HALF])
    assert set(arms(whole)) == {arm for arm in LOOKED if "@" not in arm} and arms(half) == ["fedit"]
    for seed in range(8):
        own = [r["scores"]["server"]["model"] for r in whole + half if r["config"]["seed"] == seed]
        assert len(own) == len(LOOKED) and len({each["common_loss"] for each in own}) == 1
        assert all(each["loss"] == pytest.approx(each["common_loss"]) for each in own)
        assert all(-1 <= each["cos_released"] <= 1 and each["cos"] >= -1e-6 for each in own)
    for part, looked in (("main", whole), ("half", half)):
        trained = {(arm_of(r["config"]), r["config"]["seed"]): RunConfig(**r["config"]) for r in stored[part]}
        for r in looked:
            assert RunConfig(**r["config"]) == trained[arm_of(r["config"]), r["config"]["seed"]]
