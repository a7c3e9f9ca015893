"""Runs of one report: pairs by seed, data and sites; arms whose runs differ in nothing else."""

import pytest

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.report import difference_table, summary, unpaired, write_report
from fedlora_mini.experiments.together import told_apart


def made(method, seed, dice, sites="ab", metric="dice", **config):
    search = {name: config.pop(name) for name in ("search",) if name in config}
    scores = {site: {metric: dice + seed / 100, "hd95": 1.0} for site in sites}
    own = {
        "config": RunConfig(method=method, seed=seed, **config).asdict(),
        "scores": {"personal": scores, "global": scores},
    }
    return own | {"trained": 9, "bytes_up": [8], "agg_err": [0.0], "seconds": 1.0} | search


def test_only_common_seeds_are_paired_and_the_rest_is_told():
    results = [made("fedit", s, 0.5) for s in (0, 1, 2)] + [made("ffa", s, 0.6) for s in (1, 2, 3)]
    table = difference_table(results)
    assert table.loc["FFA-LoRA − FedIT", "Dice"] == "+0.100" and table.loc["FFA-LoRA − FedIT", "seeds"] == 2
    assert unpaired(results) == ["FFA-LoRA − FedIT: left out seed 3 of ffa, seed 0 of fedit"]


@pytest.mark.parametrize("other", [{"seeds": (3, 4)}, {"data_options": {"appearance": 0.5}}, {"sites": "cd"}])
def test_arms_with_nothing_in_common_are_no_pair(other):
    seeds = other.pop("seeds", (0, 1))
    results = [made("fedit", s, 0.5) for s in (0, 1)] + [made("ffa", s, 0.6, **other) for s in seeds]
    assert difference_table(results).empty
    assert unpaired(results) == ["FFA-LoRA − FedIT: no seed, data set and sites in common"]


def test_runs_that_differ_in_more_than_the_seed_are_arms_of_their_own(tmp_path):
    results = [made("fedit", s, 0.5, rank=r) for s in (0, 1) for r in (2, 4)]
    assert list(summary(told_apart(results)).index) == ["FedIT (rank=2)", "FedIT (rank=4)"]
    text, _ = write_report(results, tmp_path)
    assert "| FedIT (rank=4) − FedIT (rank=2) |" in text.read_text() and "left out" not in text.read_text()


@pytest.mark.parametrize(
    "settings",
    [
        [{"lr": 1e-3, "search": {}}, {"lr": 2e-3, "search": {}}],
        [{"threads": 1}, {"threads": 2, "device": "cpu", "eval_every": 2}],
    ],
)
def test_a_searched_rate_and_neutral_settings_make_no_other_arm(settings):
    results = [made("fedit", seed, 0.5, **own) for seed, own in enumerate(settings)]
    assert told_apart(results) == results


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (made("ffa", 0, 0.5, sites="abc"), "other sites"),
        (made("ffa", 0, 0.5, metric="accuracy"), "other metrics"),
        (made("fedit", 0, 0.6, threads=1), "two runs of seed 0, which differ in threads"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(second, message, tmp_path):
    with pytest.raises(FedloraError, match=message):
        write_report([made("fedit", 0, 0.5), second], tmp_path / "x")
    assert not (tmp_path / "x").exists()
