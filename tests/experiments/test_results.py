"""The stored evidence: complete, paired, and the same numbers when a run is made again."""

import json
from pathlib import Path

import pytest

from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.report import arms, difference_table, markdown, read_results, summary, table_of
from fedlora_mini.experiments.run import run

RESULTS = Path(__file__).parents[2] / "results"
FILES = sorted(RESULTS.glob("*.jsonl"))


def test_there_is_evidence():
    assert {"nuclei_main", "nuclei_domains", "phantom_appearance", "phantom_supervision"} <= {f.stem for f in FILES}


def test_the_readme_shows_what_is_stored():
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    results = read_results([RESULTS / "nuclei_main.jsonl"])
    assert markdown(summary(results)) in readme and markdown(difference_table(results)) in readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_stored_run_says_what_made_it_and_arms_are_paired(path):
    results = read_results([path])
    for r in results:
        assert {"config", "versions", "machine", "scores", "final_sha256", "seconds"} <= r.keys()
        assert RunConfig(**r["config"]).asdict() == r["config"]
        assert not r["refused"]
    shapes = {table_of(results, name, "personal").shape for name in arms(results)}
    assert len(shapes) == 1, "every method has the same seeds and sites"
    matched = [{r["config"][key] for r in results} for key in ("rounds", "steps", "batch", "rank", "data", "size")]
    assert all(len(values) == 1 for values in matched)


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
