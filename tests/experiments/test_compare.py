import json
from dataclasses import replace

import pytest
import torch

from fedlora_mini.data import DATASETS
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import compare
from fedlora_mini.experiments.compare import SEARCH_ON, SEARCH_SEED, Comparison, search_seeds
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation, dataset_of
from fedlora_mini.experiments.report import (
    difference_table,
    figure,
    leakage_table,
    read_results,
    summary,
    write_report,
)
from fedlora_mini.experiments.run import run

TINY = {"sites": "2", "size": 32, "rounds": 2, "steps": 2, "batch": 2, "rank": 2, "threads": 1}
TINY |= {"data_options": {"per_site": 6, "val": 2, "test": 3}}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("comparison")
    results = Comparison(["local", "fedit", "pooled"], [0, 1], TINY, folder).run()
    return folder, results


def test_arms_are_paired_same_data_same_start_same_budget(comparison):
    _, results = comparison
    assert [(r["config"]["method"], r["config"]["seed"]) for r in results] == [
        (m, s) for s in (0, 1) for m in ("local", "fedit", "pooled")
    ]
    for key in ("rounds", "steps", "batch", "rank", "data"):
        assert len({r["config"][key] for r in results}) == 1


def test_an_interrupted_comparison_goes_on_without_repeating(comparison, monkeypatch):
    folder, results = comparison
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    monkeypatch.setattr(compare, "dataset_of", lambda config: pytest.fail("what is finished needs no data"))
    again = Comparison(["local", "fedit", "pooled"], [0, 1], TINY, folder).run()
    assert again == results
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}


def test_the_report_reads_back_what_was_written(comparison, tmp_path):
    folder, results = comparison
    assert read_results([folder]) == results
    assert len(read_results([*folder.glob("fedit-*"), folder / "results.jsonl"])) == len(results)  # each run once
    table = summary(results)
    assert list(table.index) == ["local only", "FedIT", "pooled data"]
    mean = sum(s["dice"] for r in results[::3] for s in r["scores"]["personal"].values()) / 4
    assert table.loc["local only", "personal Dice"].startswith(f"{mean:.3f}")
    differences = difference_table(results)
    assert len(differences) == 3
    a, b = (table.loc[name, "personal Dice"].split()[0] for name in ("FedIT", "local only"))
    assert float(differences.loc["FedIT − local only", "Dice"]) == pytest.approx(float(a) - float(b), abs=2e-3)
    text, picture = write_report(results, tmp_path)
    assert text.read_text().count("\n|") >= 8 and picture.read_bytes().startswith(b"\x89PNG")
    assert len(figure(results).axes) == 4


def test_a_rate_cannot_be_searched_where_a_site_has_no_validation_score(tmp_path, monkeypatch):
    data = dataset_of(RunConfig(**TINY))
    first, *others = data.sites
    blank = replace(first, val=replace(first.val, masks=torch.zeros_like(first.val.masks)))
    monkeypatch.setattr(compare, "dataset_of", lambda config: replace(data, sites=(blank, *others)))
    with pytest.raises(FedloraError, match=r"validation masks have no foreground.*name a rate"):
        Comparison(["fedit"], [0], TINY, tmp_path, rates=(1e-3, 1e-2)).run()


@pytest.mark.parametrize(("methods", "seeds", "what"), [([], [0], "methods"), (["fedit"], [], "seeds")])
def test_a_comparison_of_nothing_is_refused(methods, seeds, what, tmp_path):
    with pytest.raises(FedloraError, match=f"nothing to compare: {what} is empty"):
        Comparison(methods, seeds, TINY, tmp_path).run()


def test_one_seed_has_no_interval(comparison):
    """The sites of one seed, drawn again, would give one that says nothing of other seeds."""
    one = [r for r in comparison[1] if r["config"]["seed"] == 0]
    assert set(difference_table(one)["95 % interval"]) == {"–"}
    lines = figure(one).axes[-1].lines
    assert lines and {line.get_color() for line in lines} == {"0.4", "black"}


def test_a_client_s_bytes_do_not_depend_on_how_many_took_part(tmp_path):
    settings = TINY | {"sites": "4"}
    told = [run(RunConfig(method="fedit", fraction=f, **settings), tmp_path / str(f)) for f in (1.0, 0.5)]
    assert [r["clients"] for r in told] == [[4, 4], [2, 2]]
    one, other = (summary([r]).loc["FedIT", "KB up / client / round"] for r in told)
    assert one == other == f"{told[0]['bytes_up'][0] / 4 / 1e3:.1f}"
    without = {name: value for name, value in told[0].items() if name != "clients"}  # as older records are
    assert summary([without]).loc["FedIT", "KB up / client / round"] == one


def test_a_report_tells_leakage_and_refused_updates(tmp_path):
    result = run(RunConfig(method="iat", leakage=True, **TINY), tmp_path / "run")
    table = leakage_table([result])["IAT sharing"]
    rounds = [each["leak_cos2"] for each in result["leakage"]["rounds"]]
    level = [each["leak_cos2_chance"] for each in result["leakage"]["rounds"]]
    assert table["leak_cos2"] == f"{sum(rounds) / 2:.3g} ({sum(level) / 2:.3g})"
    assert not any(name.endswith("_chance") for name in table.index)
    refused = result | {"refused": ["client 0: numbers that are not finite"] * 2}
    text = write_report([refused], tmp_path / "report")[0].read_text()
    assert "leak_cos2" in text and "- iat, seed 0: 2 updates refused, first client 0: numbers" in text
    assert len(leakage_table([run(RunConfig(method="fedit", **TINY), tmp_path / "other")])) == 0


def test_a_folder_may_be_given_by_its_name(comparison, tmp_path):
    folder, results = comparison
    again = Comparison(["local", "fedit", "pooled"], [0, 1], TINY, str(folder)).run()
    assert again == results == read_results([str(folder)])
    text, _ = write_report(results, str(tmp_path / "report"))
    assert text == tmp_path / "report" / "report.md"
    one = next(folder.glob("fedit-seed0-*"))
    result = json.loads((one / "result.json").read_text())
    assert run(RunConfig.read(result["config"]), str(one)) == result
    assert Federation.finished(str(one)).server.round == TINY["rounds"]


def test_one_run_alone_has_a_report_too(comparison, tmp_path):
    _, results = comparison
    write_report(results[:1], tmp_path)


@pytest.mark.slow
def test_the_search_for_a_rate_never_touches_a_reported_seed(tmp_path):
    results = Comparison(["fedit"], [0], TINY, tmp_path, rates=[1e-5, 1e-2]).run()
    searched = [json.loads(p.read_text()) for p in tmp_path.glob(f"fedit-seed{SEARCH_SEED}-*/result.json")]
    assert {r["config"]["lr"] for r in searched} == {1e-5, 1e-2}
    assert all(r["scores"] == {} for r in searched), "it looks at no test image at all"
    best = max(searched, key=lambda r: r["val_dice"])
    assert [r["config"]["lr"] for r in results] == [best["config"]["lr"]]
    assert [r["config"]["seed"] for r in results] == [0]
    tried = {f"{r['config']['lr']:g}": r["val_dice"] for r in searched}
    assert results[0]["search"] == {"seeds": [SEARCH_SEED], "tried": tried}


# Real images, of which every seed draws another split.
REAL = {"data": "digits", "model": "vit", "size": 12, "dirichlet": 0.5, "clients": 2, "data_options": {"test": 300}}
REAL |= {"rounds": 1, "steps": 1, "batch": 2, "rank": 2, "threads": 1}


def images_of(parts):
    return {image.numpy().tobytes() for split in parts for image in split.images}


@pytest.mark.parametrize("on", [None, *SEARCH_ON])
def test_on_real_images_no_test_image_of_a_seed_has_a_part_in_its_search_unless_another_seed_is_asked_for(
    on, tmp_path, monkeypatch
):
    seen = {}  # seed -> all that its runs train on and validate with
    whole = compare.run

    def watched(config, folder, progress, data, test):
        seen[config.seed] = images_of(part for site in data().sites for part in (site.train, site.val))
        return whole(config, folder, progress, data, test)

    monkeypatch.setattr(compare, "run", watched)
    study = Comparison(["fedit"], [0, 1], REAL, tmp_path, [1e-3, 1e-1], search_seeds=SEARCH_ON[on] if on else None)
    results = study.run()
    for r in results:
        seed, told = r["config"]["seed"], r["search"]
        tests = images_of(site.test for site in dataset_of(RunConfig(**r["config"])).sites)
        assert len(tests) == 300
        shared = {other: len(tests & seen[other]) for other in told["seeds"]}
        assert shared == {seed: 0} if on != "other-seed" else shared[SEARCH_SEED] > 0
        assert told["tried"].keys() == {"0.001", "0.1"}
        assert f"{r['config']['lr']:g}" == max(sorted(told["tried"]), key=lambda rate: told["tried"][rate])
    assert sorted(seen) == ([0, 1, SEARCH_SEED] if on == "other-seed" else [0, 1])
    if on != "other-seed":
        assert len(list(tmp_path.glob("fedit-*"))) == 2 * 2, "the best run of a search is the reported one"


def test_a_search_is_on_another_seed_only_where_it_meets_no_test_image():
    assert {name for name in DATASETS if search_seeds(RunConfig(data=name))} == {"phantom", "brain"}
    assert search_seeds(RunConfig(data="path/to/hospitals")) == ()
    held = {"test_seed": 0}
    assert all(search_seeds(RunConfig(data=name, data_options=held)) == (SEARCH_SEED,) for name in ("nuclei", "lgg"))


def test_with_the_test_images_held_out_one_search_does_for_all_seeds(tmp_path):
    held = {"data_options": {"test": 300, "test_seed": 0}}
    results = Comparison(["fedit"], [0, 1], REAL | held, tmp_path, [1e-3, 1e-1]).run()
    searched = dataset_of(RunConfig(**results[0]["config"]).but(seed=SEARCH_SEED))
    part = images_of(part for site in searched.sites for part in (site.train, site.val))
    for r in results:
        tests = images_of(site.test for site in dataset_of(RunConfig(**r["config"])).sites)
        assert len(tests) == 300 and not tests & part and r["search"]["seeds"] == [SEARCH_SEED]


def test_an_arm_named_twice_in_another_order_is_refused(tmp_path):
    with pytest.raises(FedloraError, match="named twice"):
        Comparison(["resfim:score=lottery,tau=0.1", "resfim:tau=0.1,score=lottery"], [0], TINY, tmp_path).run()


def test_a_method_named_twice_is_refused(tmp_path):
    with pytest.raises(FedloraError, match="twice"):
        Comparison(["fedit", "fedit"], [0], TINY, tmp_path).run()


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        (["fedit", "fedavg"], {"sigma": 1.0}, "own weights: private gradients need a row"),
        (["fedit", "flora"], {"sigma": 1.0, "unit": "client"}, "'FLoRA'"),
        (["fedit", "ditto"], {"execution": "grouped"}, "'Ditto"),
        (["fedit", "fedbn"], {"model": "unet", "base": "none"}, "FedBN"),
    ],
)
@pytest.mark.parametrize("rates", [(), (1e-3, 1e-2)])
def test_an_arm_that_cannot_run_is_found_before_any_other_trains(tmp_path, arms, changes, message, rates):
    with pytest.raises(FedloraError, match=message):
        Comparison(arms, [0], TINY | changes, tmp_path, rates).run()
    assert not list(tmp_path.iterdir())


def test_a_rate_that_diverges_is_the_worst_one_and_stops_nothing(tmp_path):
    own = TINY | {"optimiser": "sgd", "rounds": 1, "steps": 3}
    [result] = Comparison(["fedit"], [0], own, tmp_path / "one", (1e-3, 1e30)).run()
    assert result["config"]["lr"] == 1e-3 and result["search"]["tried"]["1e+30"] is None
    assert json.loads((tmp_path / "one/results.jsonl").read_text())["search"] == result["search"]
    with pytest.raises(FedloraError, match=r"'fedit' diverges at every rate that was tried: 1e\+30, 1e\+31"):
        Comparison(["fedit"], [0], own, tmp_path / "all", (1e30, 1e31)).run()


@pytest.mark.parametrize("arm", ["local", "fedsa"])
def test_a_rate_is_the_worst_one_too_where_what_breaks_stays_at_the_sites(tmp_path, arm):
    """A site that trains alone sends nothing: it may not fall back on what it had before it diverged."""
    own = TINY | {"optimiser": "sgd", "rounds": 2, "steps": 3}
    [result] = Comparison([arm], [0], own, tmp_path, (1e-3, 1e30)).run()
    assert result["config"]["lr"] == 1e-3 and result["search"]["tried"]["1e+30"] is None
    with pytest.raises(FedloraError, match=r"round 1: no usable update .*client 0: NaN"):
        run(RunConfig(method=arm, lr=1e30, **own), tmp_path / "alone")


def test_what_is_finished_is_kept_where_a_later_arm_cannot_go_on(tmp_path):
    own = TINY | {"rounds": 2, "steps": 1}
    with pytest.raises(FedloraError, match=r"^fedavgm:lr=1e\+39, seed 0: "):
        Comparison(["fedit", "fedavgm:lr=1e39"], [0], own, tmp_path).run()
    [kept] = read_results([tmp_path])
    assert kept["config"]["method"] == "fedit"


def test_a_file_without_results_is_refused(tmp_path):
    with pytest.raises(FedloraError, match="holds no result"):
        read_results([tmp_path])
    (tmp_path / "x.jsonl").write_text("{broken")
    with pytest.raises(FedloraError, match="not JSON"):
        read_results([tmp_path / "x.jsonl"])


def test_data_without_unseen_sites_have_a_report(tmp_path):
    settings = TINY | {"data_options": TINY["data_options"] | {"n_unseen": 0}, "rounds": 1, "steps": 1}
    results = Comparison(["local"], [0], settings, tmp_path).run()
    assert "new site" not in results[0]["scores"]
    assert summary(results)["new-site Dice"].tolist() == ["–"]
    assert write_report(results, tmp_path)[0].exists()


@pytest.mark.slow
def test_runs_of_no_rounds_have_a_report(tmp_path):
    results = Comparison(["fedit", "iat"], [0, 1], {**TINY, "rounds": 0}, tmp_path).run()
    table = summary(results)
    assert set(table["KB up / client / round"]) == set(table["agg. error"]) == {"–"}
    assert all(path.is_file() for path in write_report(results, tmp_path))
