"""The stored evidence: complete, paired, and the same numbers when a run is made again."""

import json
from pathlib import Path

import pytest

from fedlora_mini.data import lgg
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.fewshot import TASKS, FewshotConfig, adapt
from fedlora_mini.experiments.fewshot import report as few
from fedlora_mini.experiments.report import arms, difference_table, markdown, read_results, summary, table_of
from fedlora_mini.experiments.run import run
from fedlora_mini.experiments.unadapted import EVENT, SETS, config_of, key_of
from fedlora_mini.federation import METHODS

RESULTS = Path(__file__).parents[2] / "results"
# files whose lines are not runs of `fedlora compare`
OTHERS = ("counterfactual", "fewshot", "nearness", "network", "private", "raters", "unadapted")
FILES = sorted(path for path in RESULTS.glob("*.jsonl") if not path.stem.startswith(OTHERS))
FEWSHOT = sorted(RESULTS.glob("fewshot_*.jsonl"))


def test_there_is_evidence():
    assert {"nuclei_main", "hospitals_nuclei", "phantom_appearance", "phantom_supervision"} <= {f.stem for f in FILES}


def test_the_readme_shows_what_is_stored():
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    results = read_results([RESULTS / "nuclei_main.jsonl"])
    assert markdown(summary(results)) in readme and markdown(difference_table(results)) in readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_stored_run_says_what_made_it_and_arms_are_paired(path):
    results = read_results([path])
    for r in results:
        assert {"config", "versions", "machine", "scores", "final_sha256", "seconds"} <= r.keys()
        assert r["config"].items() <= RunConfig(**r["config"]).asdict().items()  # settings that came later are at rest
        assert not r["refused"]
    for held in {r["config"].get("unseen") for r in results}:  # of sites held out in turn: each turn by itself
        turn = [r for r in results if r["config"].get("unseen") == held]
        shapes = {table_of(turn, name, "personal").shape for name in arms(turn)}
        assert len(shapes) == 1, "every method has the same seeds and sites"
        keys = ("rounds", "steps", "rank", "data", "size")
        matched = [{r["config"][key] for r in turn} for key in keys[path.stem.endswith("bytes") :]]  # not the rounds
        matched.append({r["config"]["batch"] // (len(r["sites"]) - unseen(r) if pooled(r) else 1) for r in turn})
        assert all(len(values) == 1 for values in matched), "a step of pooled data sees what all sites see together"


def pooled(r):
    return METHODS[r["config"]["method"]].pooled


def unseen(r):
    return len(r["scores"].get("new site", ()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phantom_appearance", "phantom_supervision"])
def test_a_stored_run_made_again_gives_the_same_numbers(name, tmp_path):
    """Up to the last bits of another machine's arithmetic, which training amplifies."""
    stored = [r for r in read_results([RESULTS / f"{name}.jsonl"]) if r["config"]["seed"] == 0]
    old = next(r for r in stored if r["config"]["method"] == "iat")
    new = run(RunConfig(**old["config"]), tmp_path)
    assert new["bytes_up"] == old["bytes_up"] and new["trained"] == old["trained"]
    assert new["loss"] == pytest.approx(old["loss"], abs=0.02)
    for protocol, sites in old["scores"].items():
        for site, scores in sites.items():
            assert new["scores"][protocol][site]["dice"] == pytest.approx(scores["dice"], abs=0.03), (protocol, site)
    json.dumps(new)


@pytest.mark.slow
@pytest.mark.skipif(not (lgg.ready(64) and (RESULTS / "hospitals_lgg.jsonl").is_file()), reason="needs the gliomas")
def test_a_stored_run_on_real_sites_made_again_gives_the_same_numbers(tmp_path):
    stored = read_results([RESULTS / "hospitals_lgg.jsonl"])
    old = next(r for r in stored if (r["config"]["method"], r["config"]["seed"]) == ("pooled", 0))  # the shortest
    new = run(RunConfig(**old["config"]), tmp_path)
    assert new["bytes_up"] == old["bytes_up"] and new["sites"] == old["sites"]
    assert new["loss"] == pytest.approx(old["loss"], abs=0.02)
    for site, scores in old["scores"]["personal"].items():
        assert new["scores"]["personal"][site]["dice"] == pytest.approx(scores["dice"], abs=0.05), site


def test_what_bases_give_untrained_is_stored_for_the_seeds_of_the_runs():
    records = [json.loads(line) for line in (RESULTS / "unadapted.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [key_of(r["config"]) for r in records] == [
        key_of(config_of(name, seed).asdict()) for name, (_, seeds) in SETS.items() for seed in seeds
    ]
    for file in ("hospitals_lgg", "hospitals_polypgen", "hospitals_polypgen_minisam", "hospitals_nuclei"):
        runs = read_results([RESULTS / f"{file}.jsonl"])
        assert {key_of(r["config"]) for r in runs} <= {key_of(r["config"]) for r in records}, file
    for r in records:
        assert r["event"] == EVENT and {"versions", "machine", "everything"} <= r.keys()
        assert r["config"].items() <= RunConfig(**r["config"]).asdict().items()
        assert all(0 <= site["dice"] < 0.5 for site in r["scores"]["personal"].values()), "the head is new"


@pytest.mark.parametrize("path", FEWSHOT, ids=lambda path: path.stem)
def test_few_shot_arms_are_paired_and_matched(path):
    results = read_results([path])
    for r in results:
        assert {"config", "versions", "machine", "dice", "per_class", "ranks", "kept"} <= r.keys()
        assert TASKS[r["config"]["task"]].tune, "a tuning task is not reported"
    for shots in {r["config"]["shots"] for r in results}:
        shapes = {
            few.table_of(results, name, shots).shape for name in few.arms(results) if few.of(results, name, shots)
        }
        assert len(shapes) == 1, "every arm has the same splits and tasks"
    for task in {r["config"]["task"] for r in results}:
        for name in few.arms(results):
            own = few.of(results, f"{name}@{task}")
            assert len({r["config"]["lr"] for r in own}) <= 1, "one rate an arm and task"
    assert len({(r["config"]["steps"], r["config"]["batch"]) for r in results}) == 1


@pytest.mark.slow
def test_a_stored_few_shot_run_made_again_gives_the_same_numbers():
    results = read_results([RESULTS / "fewshot_phantom.jsonl"])
    for name in ("lora-4", "arena-8"):
        old = next(r for r in few.of(results, name, 5) if r["config"]["split"] == 0)
        new = adapt(FewshotConfig(**old["config"] | {"changes": ()})).record
        assert new["trained"] == old["trained"]
        assert new["dice"] == pytest.approx(old["dice"], abs=0.03)
        assert new["loss"] == pytest.approx(old["loss"], abs=0.02)
        assert new["rank"] == pytest.approx(old["rank"], rel=0.15)
