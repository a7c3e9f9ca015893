"""`fedlora private`: every arm of the study runs, says what its epsilon depends on, and is named as claims name it."""

import json
import math

import pytest

from fedlora_mini.cli import main
from fedlora_mini.cli.private import SEGMENTING
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import private, private_sharpness
from fedlora_mini.experiments.arms import arm_of, parse_arm
from fedlora_mini.experiments.claims import CLAIMS
from fedlora_mini.experiments.compare import Comparison
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.private import COMMON, PARTS, PrivateStudy, Searched, curves, edges, table
from fedlora_mini.experiments.report import read_results, write_report
from fedlora_mini.federation import METHODS
from fedlora_mini.metrics import recognise
from fedlora_mini.privacy import Release, epsilon

SHORT = {"rounds": 2, "accountant": "rdp"}
ARMS = tuple(dict.fromkeys(arm for part in PARTS.values() for arm in part.arms))


def study(tmp_path, parts, seeds=(0,), **more):
    return PrivateStudy(parts, seeds, tmp_path, SHORT | more.pop("changes", {}), **more)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_are_written_as_stored_runs_are_named(arm):
    name, change = parse_arm(arm)
    assert METHODS[name].but(**change) and arm_of({"method": name, "change": change}) == arm


def test_every_comparison_of_the_specification_is_there():
    """Schedules times filters at every epsilon and share of labels; what test_private_stored.py asks of the files."""
    schedules = ("fedit", "ffa", "rolora", "la_lora", "la_lora:first=A", private.AS)
    for cell in ("", *private.CELLS):
        own = [PARTS[f"{cell}_{name}" if cell else name] for name in ("half", "rest")]
        arms = set(PARTS[cell or "main"].arms) | set(own[1].arms)
        assert {arm for name in schedules for arm in private.filtered(name)} | {"fedit:filter=doppler"} <= arms
        assert set(private.filtered("fedit")) == set(own[0].arms) and own[0].settings["steps"] == private.STEPS // 2
    cells = {(told["dirichlet"], told["epsilon"]) for told in (COMMON | each for each in private.CELLS.values())}
    assert cells | {(0.1, 3.0)} == {(alpha, budget) for alpha in (0.1, 0.3, 0.5) for budget in (1.0, 3.0, 8.0)}
    for where in ("mnist", "phantom", "nuclei"):
        arms = set(PARTS[where].arms) | set(PARTS[f"{where}_rest"].arms)
        assert {arm for name in schedules for arm in private.filtered(name)} | {"fedit:filter=doppler"} <= arms
        assert PARTS[f"{where}_half"].arms == tuple(private.filtered("fedit"))
        assert set(PARTS[f"{where}_open"].arms) == set(private.FIXED)
    for cell in ("e1", "e8"):
        parts = [PARTS[f"phantom{kind}"].arms for kind in (f"_{cell}", f"_{cell}_half", f"_{cell}_rest")]
        assert parts == [PARTS[f"phantom{kind}"].arms for kind in ("", "_half", "_rest")]
    for cell in private.CELLS:
        own, half = PARTS[f"nuclei_{cell}"], PARTS[f"nuclei_{cell}_half"]
        assert set(schedules) < set(own.arms) and own.settings.items() >= private.CELLS[cell].items()
        assert half.arms == ("fedit",) and half.settings == own.settings | {"steps": private.STEPS // 2}


def test_claims_on_private_runs_name_arms_of_the_study():
    later = {"private_sharpness"}  # made from the runs of `main`
    for key, claim in CLAIMS.items():
        for arm, file in claim.parts(claim.a) + claim.parts(claim.b):
            if file.startswith("private_") and file not in later:
                assert arm in PARTS[file.removeprefix("private_")].arms, key


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every arm of `main` for two rounds, without a search."""
    folder = tmp_path_factory.mktemp("private")
    return study(folder, ["main"], rates=(0.3,)).run()["main"]


@pytest.mark.slow
def test_every_arm_runs_and_prints_what_epsilon_depends_on(ran):
    assert [arm_of(r["config"]) for r in ran] == list(PARTS["main"].arms)
    for r in ran:
        told = r["privacy"]
        assert told["releases"] == [8] * 8 and told["delta"] == 1e-5 and told["q"] == pytest.approx(0.128)
        assert told["epsilon"] == epsilon([Release(told["sigma"], told["q"], 8)], 1e-5, "rdp") <= 3.0
        assert {"energy", "agg_err", "kb_up"} == r["scores"]["server"]["model"].keys()
        assert all(0 <= s["accuracy"] <= 1 and s["loss"] > 0 for s in r["scores"]["global"].values())
    shown = table(ran)
    assert {"accuracy", "seeds", "rate", "σ", "q", "releases"} <= set(shown.columns)
    assert "AS-LoRA (warmup=2)" in shown.index and len(shown) == len(PARTS["main"].arms)


@pytest.mark.slow
def test_all_arms_have_one_noise_and_as_lora_averages_exactly(ran):
    assert len({r["privacy"]["sigma"] for r in ran}) == 1
    errors = {arm_of(r["config"]): r["scores"]["server"]["model"]["agg_err"] for r in ran}
    for arm in (private.AS, "rolora", "ffa"):
        assert errors[arm] < 1e-5 < errors["la_lora"]


@pytest.mark.slow
def test_half_the_steps_need_less_noise_for_the_same_epsilon(tmp_path, ran):
    half = study(tmp_path, ["half"], rates=(0.3,), changes={"rounds": 2}).run()["half"][0]
    whole = ran[0]
    assert half["config"]["steps"] == whole["config"]["steps"] // 2 and half["privacy"]["releases"] == [4] * 8
    assert half["privacy"]["sigma"] < whole["privacy"]["sigma"]
    assert 2.9 < half["privacy"]["epsilon"] <= 3.0


@pytest.mark.slow
def test_rates_are_searched_on_a_seed_that_is_not_reported_and_edges_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "main", private.Part("two arms", ("ffa", "la_lora")))
    monkeypatch.setattr(private, "WIDEN", 0)
    own = study(tmp_path, ["main"], rates=(0.01, 0.3))
    results = own.run()["main"]
    stored = read_results([tmp_path / "private_rates.jsonl"])
    assert {r["config"]["seed"] for r in stored} == set(private.SEARCH_SEEDS) and len(stored) == 4 * len(
        private.SEARCH_SEEDS
    )
    assert all("scores" not in r for r in stored), "no search has a use for test images"
    found = curves(stored)
    assert found.keys() == {(arm, 3.0, 0.1, 4, "digits", 2, None) for arm in ("ffa", "la_lora")}
    for r in results:
        curve = found[Searched.of(r["config"])]
        assert curve[r["config"]["lr"]] == max(curve.values())
    assert len(edges(stored)) == 2 and "is an edge" in edges(stored)[0], "of two rates the better one is an edge"
    assert not edges([])


@pytest.mark.parametrize(
    ("peak", "tried"), [(1.0, [0.5, 1, 2]), (3.0, [0.5, 1, 2, 4, 8]), (0.3, [0.125, 0.25, 0.5, 1, 2])]
)
def test_a_search_goes_on_where_its_best_rate_is_the_last_of_the_grid(tmp_path, peak, tried):
    class Fake(Comparison):
        def _one(self, config, test=True):
            return {"config": config.asdict(), "val_accuracy": -abs(math.log(config.lr / peak))}

    own = Fake(["ffa"], [0], COMMON, tmp_path, (0.5, 1.0, 2.0), widen=2)
    [r] = own.run()
    assert sorted(s["config"]["lr"] for s in own.searched) == tried
    assert r["config"]["lr"] == min(tried, key=lambda lr: abs(math.log(lr / peak)))


def test_without_training_a_new_head_guesses(tmp_path):
    [r] = study(tmp_path, ["untrained"], changes={"rounds": 0}).run()["untrained"]
    scores = [s["accuracy"] for s in r["scores"]["global"].values()]
    assert sum(scores) / len(scores) < 0.25 and "privacy" not in r and r["bytes_up"] == []


@pytest.mark.slow
def test_noise_alone_obeys_the_count_of_noisy_steps(tmp_path):
    """Alternating for K steps is like both factors for K/2, and less than both for K."""
    told = study(tmp_path, ["noise", "noise_half"], seeds=(0,), changes={"rounds": 4}).run()
    mean = {}
    for part, results in told.items():
        for r in results:
            mean.setdefault((part, arm_of(r["config"])), []).append(r["scores"]["server"]["model"]["energy"])
    mean = {key: sum(values) / len(values) for key, values in mean.items()}
    whole, turns, half = mean["noise", "fedit"], mean["noise", "la_lora"], mean["noise_half", "fedit"]
    assert whole - turns > 0.6 > 0.25 > abs(turns - half)


def test_the_raw_curvature_of_as_lora_is_not_private():
    raw = {"method": "as_lora", "change": {"curvature": "raw"}}
    with pytest.raises(FedloraError, match="no privacy budget"):
        RunConfig(**COMMON | raw)
    for sigma in (None, 1.0):  # without a budget it may be tried, under noise too
        assert RunConfig(**COMMON | raw | {"epsilon": None, "sigma": sigma}).row.work.free is False


def test_the_scores_are_those_of_the_common_model_on_everybodys_test_images(tmp_path):
    from fedlora_mini.experiments.federation import Federation

    federation = Federation.build(RunConfig(**COMMON | {"method": "ffa", "rounds": 1, "accountant": "rdp"}))
    list(federation.rounds())
    scores = federation.evaluate()["global"]
    whole = type(federation.data.sites[0].test).concat([site.test for site in federation.data.sites])
    found = recognise(federation.model, federation.engine.common(federation.server), whole, federation.data.classes)
    assert sum(s["accuracy"] for s in scores.values()) / 8 == pytest.approx(found.accuracy)


def test_the_command_lists_parts_and_names_a_wrong_one(capsys, tmp_path):
    assert main(["private", "--list"]) == 0
    assert "la_lora:filter=low-pass" in capsys.readouterr().out
    assert main(["private", "--parts", "man", "--out", str(tmp_path)]) == 2
    assert "Did you mean 'main'" in capsys.readouterr().err


def test_the_command_prints_a_table(capsys, tmp_path):
    assert main(["private", "--parts", "untrained", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert "the base under a new head" in capsys.readouterr().out
    assert json.loads((tmp_path / "private_untrained.jsonl").read_text())["config"]["rounds"] == 0


@pytest.mark.slow
def test_any_report_of_labels_speaks_of_accuracy(ran, tmp_path):
    text, picture = write_report(ran[:3], tmp_path)
    assert "personal accuracy" in text.read_text() and "HD95" not in text.read_text() and picture.exists()


@pytest.mark.parametrize(("data", "held"), [("nuclei", {"test_seed": 0}), ("phantom", {})])
def test_on_other_data_the_test_images_of_real_sets_stay_out_of_the_search(monkeypatch, data, held):
    asked = []

    class Study:
        searched = ()

        def __init__(self, parts, seeds, folder, changes, rates, on_run):
            asked.append(changes)

        def run(self):
            return {}

    monkeypatch.setattr(private, "PrivateStudy", Study)
    assert main(["private", "--data", data, "--seeds", "0"]) == 0
    assert asked[0]["data_options"] == SEGMENTING["data_options"] | held and asked[0]["clients"] == 8


def test_where_test_images_move_with_the_seed_every_split_searches_on_its_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(private, "Comparison", lambda *args: asked.append(args[6]) or FakeComparison())
    options = {"data_options": {"val": 4}}
    for changes in ({"data": "nuclei", "clients": 8} | options, {"data": "phantom"} | options, {}):
        PrivateStudy(["half"], [0], tmp_path, changes).run()
    assert asked == [(), private.SEARCH_SEEDS, private.SEARCH_SEEDS]


class FakeComparison:
    searched = ()

    def check(self):
        pass

    def run(self):
        return []


@pytest.mark.slow
def test_masks_are_a_task_of_the_same_study(tmp_path):
    """A private segmentation: MiniSAM on phantoms, scored by Dice."""
    small = {"data_options": {"per_site": 24, "val": 4, "test": 4}, "batch": 6, "rounds": 1, "steps": 2}
    own = PrivateStudy(["half"], [0], tmp_path, SEGMENTING | SHORT | small | {"data": "phantom"}, rates=(0.1,))
    results = own.run()["half"]
    told = table(results)
    assert told["dice"].size == 4 and set(told["releases"]) == {"2"}
    assert all(r["privacy"]["q"] == pytest.approx(0.5) and r["privacy"]["epsilon"] <= 3 for r in results)


@pytest.mark.slow
def test_sharpness_is_compared_where_all_arms_have_the_same_training_loss():
    short = COMMON | SHORT | {"rounds": 3, "lr": 0.3}
    arms = [RunConfig(**short | {"method": name}) for name in ("la_lora", "ffa")]
    records = private_sharpness.compare(arms)
    told = [r["scores"]["server"]["model"] for r in records]
    assert told[0]["common_loss"] == told[1]["common_loss"] == max(min(r["losses"]) for r in records)
    for r, own in zip(records, told, strict=True):
        assert own["loss"] == pytest.approx(own["common_loss"], abs=1e-9)
        whole = math.floor(own["round"])
        on_line = r["losses"][whole], r["losses"][min(whole + 1, len(r["losses"]) - 1)]
        assert min(on_line) - 1e-9 <= own["loss"] <= max(on_line) + 1e-9
        assert own["log_lambda_max"] > -10 and r["privacy"]["releases"] == [12] * 8
        assert 0 <= own["cos"] <= 1 and -1 <= own["cos_released"] <= 1, "exact gradients never pull apart"


def test_a_loss_between_two_rounds_is_looked_at_in_both():
    traced = private_sharpness.Traced(None, [], [3.0, 2.0, 1.0, 1.5])
    assert traced.around(2.5) == [(0, 0.5), (1, 0.5)] and traced.around(1.25) == [(1, 0.25), (2, 0.75)]
    assert traced.around(3.0) == [(0, 1.0)] and traced.around(1.0) == [(2, 1.0)]
    with pytest.raises(FedloraError, match=r"passes 0\.5 between no two rounds"):
        traced.around(0.5)


def test_where_a_run_starts_it_can_be_looked_at_too():
    """An arm may pass the common loss in its first round; there B = 0."""
    traced = private_sharpness.Traced.of(RunConfig(**COMMON | SHORT | {"rounds": 1, "lr": 0.3, "method": "la_lora"}))
    start = traced.looked_at(traced.losses[0])
    assert len(traced.losses) == 2 and start["round"] == 0 and start["loss"] == traced.losses[0]
    assert all(math.isfinite(value) for value in start.values())


def test_a_part_that_cannot_run_is_found_before_any_other_trains(tmp_path):
    with pytest.raises(FedloraError, match="leave out 'passes'"):
        study(tmp_path, ["untrained", "main"], changes={"passes": 1.0}).run()
    assert not list(tmp_path.iterdir())


def test_a_part_with_more_seeds_has_none_twice(tmp_path):
    for seeds in ((0, 2), (0, 1, 2), (3, 7, 4)):
        own = study(tmp_path, ["noise_half"], seeds)._study("noise_half").seeds
        assert len(set(own)) == len(own) == 4 * len(seeds) and own[: len(seeds)] == list(seeds)
    assert study(tmp_path, ["noise"], tuple(range(8)))._study("noise").seeds == list(range(32)), "the stored runs"
