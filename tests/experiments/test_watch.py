"""Leakage of a run: what is logged, for which rows, and that looking changes nothing."""

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.leakage import FOLDS, geometry, split_pairs
from fedlora_mini.experiments.report import table_of
from fedlora_mini.experiments.run import run
from fedlora_mini.federation import METHODS

TINY = {"sites": "3", "size": 32, "rounds": 4, "steps": 2, "batch": 2, "rank": 2, "threads": 1, "base": "none"}
TINY |= {"data_options": {"per_site": 4, "val": 4, "test": 2}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return run(RunConfig(method="iat", leakage=True, **TINY), tmp_path_factory.mktemp("iat"))


def test_looking_does_not_change_the_run(watched, tmp_path):
    plain = run(RunConfig(method="iat", **TINY), tmp_path)
    assert plain["final_sha256"] == watched["final_sha256"] and "leakage" not in plain


@pytest.mark.parametrize(
    ("method", "change"), [("iat", {}), pytest.param("harmofl", {"fraction": 0.6}, marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_ends_with_the_leakage_of_the_whole_one(tmp_path, method, change):
    """HarmoFL's start is what its first clients' amplitude makes of the images."""

    def stop(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    config = RunConfig(method=method, leakage=True, **TINY | {"rounds": 5} | change)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", stop)
    whole, again = run(config, tmp_path / "whole"), run(config, tmp_path / "stopped")
    assert again["leakage"] == whole["leakage"] and again["final_sha256"] == whole["final_sha256"]
    assert ("site_probe" in whole["leakage"]) == (method == "iat")


def test_looking_writes_no_statistics_into_norms_that_train(tmp_path):
    own = TINY | {"rounds": 2, "steps": 1, "data_options": {"per_site": 4, "val": 4, "test": 2}}
    config = RunConfig(method="fedavg", model="unet_bn", **own)
    plain, watched = run(config, tmp_path / "plain"), run(config.but(leakage=True), tmp_path / "watched")
    assert "feature_probe" in watched["leakage"] and plain["final_sha256"] == watched["final_sha256"]


def test_images_with_one_label_each_can_be_watched(tmp_path):
    own = {"data": "digits", "model": "vit", "size": 8, "base": "none", "dirichlet": 10.0, "clients": 3, "threads": 1}
    told = run(RunConfig(method="iat", leakage=True, rounds=2, steps=3, batch=4, **own), tmp_path)["leakage"]
    assert told["rounds"][1]["leak_energy"] > 0


METRICS = {"site_spread", "leak_energy", "leak_cos2", "leak_explained", "overlap"}
AT_THE_END = {"site_probe", "feature_probe", "swap_drop"}
HELD_OUT = {"heldout", "heldout_start"}
BESIDE = {
    "site_probe_rounds",
    "site_probe_95",
    "feature_probe_95",
    "feature_probe_start",
}  # beside a probe


def levels(metrics):
    return {f"{metric}_chance" for metric in metrics}


def test_every_round_has_every_metric_beside_its_level(watched):
    rounds = watched["leakage"]["rounds"]
    assert len(rounds) == 4
    for t, record in enumerate(rounds, 1):
        late = AT_THE_END - {"site_probe"} if t < FOLDS else AT_THE_END
        beside = {name for name in BESIDE if name.startswith(tuple(late))}
        assert set(record) == METRICS | levels(METRICS) | late | levels(late) | beside | HELD_OUT
        assert all(0 <= record[metric] <= 1 for metric in METRICS | levels(METRICS))
        assert record["leak_cos2_chance"] < 0.01 and record["site_spread_chance"] > 0
    first, last = rounds[0], rounds[-1]
    assert first["leak_cos2"] == first["leak_explained"] == 0, "B = 0: the private change does nothing yet"
    at_first = [first["leak_energy"], first["leak_energy_chance"]]
    assert at_first == pytest.approx([0, 0], abs=1e-12), "A is equal everywhere: nothing leaks at first"
    assert all(last[metric] > 0 for metric in METRICS | levels(METRICS))


def test_the_end_has_the_probes_and_what_a_swap_costs_beside_their_levels(watched):
    end, last = watched["leakage"], watched["leakage"]["rounds"][-1]
    assert set(end) == {"rounds"} | AT_THE_END | levels(AT_THE_END) | BESIDE | HELD_OUT
    assert all(end[name] == last[name] for name in set(end) - {"rounds"})
    assert end["swap_drop"] != watched["leakage"]["rounds"][0]["swap_drop"]
    assert end["site_probe_rounds"] == 4
    for probe in ("site_probe", "feature_probe"):
        assert 0 <= end[probe] <= 1 and 0 < end[f"{probe}_95"] <= 1
        assert end[f"{probe}_chance"] == pytest.approx(1 / 3, abs=0.08)
    assert 0 <= end["feature_probe_start"] <= 1
    assert len(end["swap_drop"]) == 3 and end["swap_drop_chance"] == 0
    dice = [site["dice"] for site in watched["scores"]["new site"].values()]
    assert end["heldout"] == pytest.approx(dice) and end["heldout"] != end["heldout_start"]


@pytest.mark.slow
def test_features_tell_sites_by_their_scanners_and_guess_where_they_have_one():
    for appearance, told in ((1.0, True), (0.0, False)):
        options = {"per_site": 4, "val": 12, "test": 1, "appearance": appearance}
        federation = Federation.build(RunConfig(method="iat", leakage=True, **TINY | {"data_options": options}))
        next(iter(federation.rounds()))
        found = federation.leakage
        assert (found["feature_probe"] > found["feature_probe_95"]) == told
        assert (found["feature_probe_start"] > found["feature_probe_95"]) == told, "images alone tell as much"


SPREAD = {"site_spread", "site_spread_chance"}


BRANCHES = SPREAD | {"leak_cos2", "leak_cos2_chance"}


PAIRS = METRICS | levels(METRICS)
SPLIT = ["fedsa", "fedsa_sor", "inverse_fedsa", "inverse_fedsa_sor", "iat", "iat_sor", "anti_iat"]
SPLIT += ["iat_own_head", "anti_own_head", "anti_sor"]
TWO = ["dual", "dual_sor", "dual_alike", "dual_alike_sor", "client_tailored", "fdlora"]
SILENT = ["local", "fedproto"]
OTHERS = METHODS.keys() - {*SPLIT, *TWO, *SILENT}  # nothing of a pair stays, or what stays is of another form
EXPECTED = dict.fromkeys(OTHERS, SPREAD) | dict.fromkeys(SPLIT, PAIRS)
EXPECTED |= dict.fromkeys(TWO, BRANCHES) | dict.fromkeys(SILENT, frozenset())
KEEP = {*SPLIT, *TWO, *SILENT, "encoder_local", "decoder_local", "fedalt", "hydra", "pfedlora", "pfedsam"}
KEEP |= {"fedbn", "fedrep", "fedas", "lcfed"}  # rows of which something stays at the sites
QUICK = ("fedit", "local", "dual", "hydra", "pfedsam")  # one of every kind, and both with experts


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in METHODS])
def test_every_row_has_the_metrics_that_are_defined_for_it_and_no_others(tmp_path, name):
    found = run(RunConfig(method=name, leakage=True, **TINY | {"rounds": 2, "steps": 4}), tmp_path)["leakage"]
    for record in found["rounds"]:
        assert {metric for metric in record if not metric.startswith(tuple(AT_THE_END | HELD_OUT))} == EXPECTED[name]
        assert all(0 <= record[metric] <= 1 for metric in EXPECTED[name])
        assert all(np.isfinite(value).all() for value in record.values())
        assert name == "pooled" or all(record[metric] > 0 for metric in EXPECTED[name] & SPREAD)
    assert found.keys() >= HELD_OUT
    assert ("swap_drop" in found) == (name in KEEP)
    assert ("feature_probe" in found) == bool(EXPECTED[name])


@pytest.mark.parametrize("name", ["flexlora", pytest.param("hetlora", marks=pytest.mark.slow)])
def test_directions_beyond_a_clients_rank_have_not_moved(name):
    """The first round, from B = 0 and a common A, of clients of rank 1, 2 and 3."""
    config = RunConfig(method=name, leakage=True, ranks=[1, 2, 3], **TINY | {"rounds": 1, "rank": 3})
    federation = Federation.build(config)
    start, sent = S.clone(federation.server.state), spied(federation)
    next(iter(federation.rounds()))
    for update, moved in zip(sent, federation.watch.sent[0], strict=True):
        assert moved.keys() == update.state.keys()
        for key in federation.engine.keys.values():
            change, r = moved[key.name], update.client + 1
            if key.factor == "A":
                assert torch.equal(change[:r], update.state[key.name] - start[key.name][:r]) and not change[r:].any()
            if key.factor == "B":
                assert torch.equal(change[:, :r], update.state[key.name]) and not change[:, r:].any()
    assert 0 < federation.leakage["site_spread"] < 1 and federation.leakage["site_spread_chance"] > 0


def test_the_level_of_an_overlap_is_the_mean_over_layers_of_at_most_one():
    """Of four directions in two dimensions nothing can be left out, of two in eight a quarter is met by chance."""
    rng = torch.Generator().manual_seed(0)

    def site():
        sizes = {"narrow": (2, 4), "wide": (8, 2)}  # B: (m, r)
        return {
            f"{path}.{factor}": torch.randn(shape, generator=rng).double()
            for path, (m, r) in sizes.items()
            for factor, shape in (("B", (m, r)), ("A", (r, 6)))
        }

    starts, ends = [site() for _ in range(2)], [site() for _ in range(2)]
    found = geometry(starts, ends, [1.0, 1.0], {"narrow": "B", "wide": "B"}, rng)
    assert found["overlap_chance"] == (1 + 2 / 8) / 2


@pytest.mark.slow
def test_branches_that_start_alike_are_one_until_the_first_mean(tmp_path):
    def measured(method, change=None):
        config = RunConfig(method=method, change=change or {}, leakage=True, **TINY)
        rounds = run(config, tmp_path / config.key())["leakage"]["rounds"]
        return [record["leak_cos2"] for record in rounds]

    alike, apart, held = measured("dual_alike"), measured("dual"), measured("dual_alike_sor", {"lam": 10.0})
    assert alike[0] == pytest.approx(1) and alike[-1] < alike[0]
    assert max(apart) < 0.5 * min(alike) and held[-1] < alike[-1]


def test_the_level_of_the_spread_trains_on_the_halves_of_every_sites_images():
    """One step of gradient descent on all of four images: the halves' updates have the whole one as their mean."""
    settings = {"optimiser": "sgd", "lr": 0.3, "steps": 1, "batch": 4, "augment": False, "rounds": 1}
    federation = Federation.build(RunConfig(method="fedit", leakage=True, **TINY | settings))
    next(iter(federation.rounds()))
    watch, members = federation.watch, federation.engine.members
    for member, sent in zip(members, watch.sent[0], strict=True):
        halves = [watch.twins[member.number](half) for half in (0, 1)]
        start = watch.before[member.number]
        for name, change in sent.items():
            mean = (halves[0][name] + halves[1][name]) / 2 - start[name]
            assert torch.allclose(mean, change, atol=0.05 * float(change.abs().max()) + 1e-7), name
        assert any(not torch.equal(halves[0][name], halves[1][name]) for name in sent)


def test_a_run_stored_before_a_metric_was_logged_is_left_out_with_a_warning(watched):
    old = {**watched, "leakage": {"rounds": [{"leak_cos2": 0.1}, {"leak_cos2": 0.3}]}}
    old = {**old, "config": {**watched["config"], "seed": 1}}
    assert table_of([watched, old], "iat", "leakage", "leak_cos2")[1].tolist() == [pytest.approx(0.2)]
    with pytest.warns(UserWarning, match=r"1 of 2 runs of 'iat' did not log 'feature_probe'; logged: feature_probe, "):
        assert table_of([watched, old], "iat", "leakage", "feature_probe").shape == (1, 1)
    with pytest.warns(UserWarning, match="1 of 1 runs of 'iat' did not log 'leak_energy'; logged: leak_cos2"):
        assert not table_of([old], "iat", "leakage", "leak_energy").size


def spied(federation):
    """The updates that will come in."""
    sent, exchange = [], federation.engine.exchange

    def spy(requests):
        for update in exchange(requests):
            sent.append(update)
            yield update

    federation.engine.exchange = spy
    return sent


def vector(state, start):
    """The change of what was sent, flat in float64; an entry behind a 0 of its mask was not sent."""
    parts = []
    for name in (n for n in state if "~" not in n):
        change = state[name].double() - start[name]
        if f"{name}~mask" in state:
            change = change * state[f"{name}~mask"]
        parts.append(change.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize(("name", "rounds"), [("fedsa", 1), ("resfim_lora", 3)])
def test_the_spread_and_its_level_are_those_of_what_was_sent(name, rounds):
    """Against the definition on flat vectors, from rounds watched from outside; resfim has masks from the second on."""
    federation = Federation.build(RunConfig(method=name, leakage=True, **TINY))
    sent, going = spied(federation), federation.rounds()
    for _ in range(rounds):
        sent.clear()
        start = S.clone(federation.server.state)
        next(going)
    assert any("~mask" in n for n in sent[0].state) == (name == "resfim_lora")
    vectors = torch.stack([vector(update.state, start) for update in sent])
    p = torch.tensor([update.weight for update in sent], dtype=torch.float64)[:, None]
    p = p / p.sum()
    spread = (p * (vectors - (p * vectors).sum(0)).square()).sum() / (p * vectors.square()).sum()
    assert federation.leakage["site_spread"] == pytest.approx(float(spread), rel=1e-4)
    assert S.norm(federation.watch.sent[-1][0]) == pytest.approx(float(vectors[0].norm()), rel=1e-4)
    one, two = (torch.stack([vector(federation.watch.twins[u.client](half), start) for u in sent]) for half in (0, 1))
    level = (p * (1 - p) * (one - two).square()).sum() / (p * (one + two).square()).sum()
    assert federation.leakage["site_spread_chance"] == pytest.approx(float(level), rel=1e-4)


def test_pairs_are_split_as_the_row_says():
    federation = Federation.build(RunConfig(method="iat", **TINY))
    pairs = split_pairs(METHODS["iat"], federation.engine.keys)
    assert {federation.engine.keys[f"{path}.A"].region: factor for path, factor in pairs.items()} == {
        "encoder": "B",
        "decoder": "A",
    }
    assert split_pairs(METHODS["fedit"], federation.engine.keys) == {}
