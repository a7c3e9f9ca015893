"""Leakage of a run: what is logged, for which rows, and that looking changes nothing."""

import pytest
import torch

from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.leakage import split_pairs
from fedlora_mini.experiments.run import run
from fedlora_mini.federation import METHODS

TINY = {"sites": "3", "size": 32, "rounds": 4, "steps": 2, "batch": 2, "rank": 2, "threads": 1, "base": "none"}
TINY |= {"data_options": {"per_site": 4, "val": 2, "test": 2}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return run(RunConfig(method="iat", leakage=True, **TINY), tmp_path_factory.mktemp("iat"))


def test_looking_does_not_change_the_run(watched, tmp_path):
    plain = run(RunConfig(method="iat", **TINY), tmp_path)
    assert plain["final_sha256"] == watched["final_sha256"] and "leakage" not in plain


def test_every_round_has_every_metric_beside_its_chance_level(watched):
    rounds = watched["leakage"]["rounds"]
    assert len(rounds) == 4
    for record in rounds:
        assert set(record) == {
            "site_spread",
            "leak_energy",
            "leak_cos2",
            "leak_explained",
            "leak_explained_chance",
            "overlap",
            "overlap_chance",
        }
        assert all(0 <= value <= 1 for value in record.values())
    assert rounds[0]["leak_cos2"] == rounds[0]["leak_explained"] == 0, "B = 0: the private change does nothing yet"
    assert rounds[0]["leak_energy"] == 0, "A is equal everywhere: nothing leaks in the first gradient"
    assert rounds[-1]["leak_cos2"] > 0 and rounds[-1]["leak_explained"] > 0


def test_the_end_has_the_probe_and_what_a_swap_costs(watched):
    end = watched["leakage"]
    assert end["site_probe_rounds"] == 4 and 0 <= end["site_probe"] <= 1
    assert end["site_probe_chance"] == pytest.approx(1 / 3, abs=0.08)
    assert len(end["swap_drop"]) == 3


@pytest.mark.parametrize(("name", "metrics"), [("fedit", {"site_spread"}), ("local", set())])
def test_rows_that_split_no_pair_have_the_spread_alone_or_nothing(tmp_path, name, metrics):
    result = run(RunConfig(method=name, leakage=True, **TINY), tmp_path)
    assert all(set(record) == metrics for record in result["leakage"]["rounds"])
    assert ("swap_drop" in result["leakage"]) == (name == "local")


def test_the_spread_is_that_of_what_was_sent():
    """Against the definition on flat vectors, from a round watched from outside."""
    federation = Federation.build(RunConfig(method="fedsa", leakage=True, **TINY))
    sent = []
    exchange = federation.engine.exchange

    def spy(requests):
        for update in exchange(requests):
            sent.append((update.weight, update.state))
            yield update

    federation.engine.exchange = spy
    start = {name: value.clone() for name, value in federation.server.state.items()}
    next(iter(federation.rounds()))
    vectors = torch.stack([torch.cat([(v - start[n]).flatten() for n, v in state.items()]) for _, state in sent])
    p = torch.tensor([weight for weight, _ in sent])[:, None] / sum(weight for weight, _ in sent)
    spread = (p * (vectors - (p * vectors).sum(0)).square()).sum() / (p * vectors.square()).sum()
    assert federation.leakage["site_spread"] == pytest.approx(float(spread), rel=1e-4)


def test_pairs_are_split_as_the_row_says():
    federation = Federation.build(RunConfig(method="iat", **TINY))
    pairs = split_pairs(METHODS["iat"], federation.engine.keys)
    assert {federation.engine.keys[f"{path}.A"].region: factor for path, factor in pairs.items()} == {
        "encoder": "B",
        "decoder": "A",
    }
    assert split_pairs(METHODS["fedit"], federation.engine.keys) == {}
