"""Few-shot studies: what is drawn, one run, many runs that resume, and the tables made of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_mini import cli
from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import claims
from fedlora_mini.experiments.fewshot import report
from fedlora_mini.experiments.fewshot import run as fewshot
from fedlora_mini.experiments.fewshot.arms import ARMS, EXTRA, Arm, arm
from fedlora_mini.experiments.fewshot.run import FewshotConfig, Plateau, Study, adapt, read_lines
from fedlora_mini.experiments.fewshot.tasks import TASKS, task
from fedlora_mini.regularizers.companions import companions

TINY = {"steps": 3, "batch": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Test sets of six images instead of 48."""
    torch.set_num_threads(1)
    for name, row in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(row, test=6, size=32 if row.data == "phantom" else row.size))
    fewshot._drawn.cache_clear()
    yield
    fewshot._drawn.cache_clear()


def test_fewer_shots_are_the_first_of_more_and_every_split_has_its_own_images():
    few, many, classes = task("vessel").draw(2, 0)
    more, again, _ = task("vessel").draw(5, 0)
    assert classes == ("background", "vessel") and len(few) == 2 and len(more) == 5 and len(many) == 6
    assert torch.equal(more.images[:2], few.images) and torch.equal(again.images, many.images)
    other, elsewhere, _ = task("vessel").draw(5, 1)
    for a in (*other.images, *many.images):
        assert not any(torch.equal(a, b) for b in (*more.images, *elsewhere.images))


def test_a_phantom_task_is_one_organ_against_everything_else():
    few, many, _ = task("vessel").draw(5, 0)
    assert set(torch.cat([few.masks, many.masks]).unique().tolist()) == {0, 1}
    assert (few.masks.flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("shots", [0, 11])
def test_shots_out_of_range_are_refused(shots):
    with pytest.raises(FedloraError, match="from 1 to 10"):
        task("vessel").draw(shots, 0)


def test_every_task_has_a_tuning_task_that_is_not_reported():
    for name, row in TASKS.items():
        assert row.tune == "" or TASKS[row.tune].tune == "", name
        assert row.model == (TASKS[row.tune] if row.tune else row).model


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(FedloraError, match="Did you mean 'vessel'"):
        task("vessle")
    with pytest.raises(FedloraError, match="Did you mean 'arena-8'"):
        arm("arena8")


@pytest.mark.parametrize("name", [n if n in ARMS else pytest.param(n, marks=pytest.mark.slow) for n in (*ARMS, *EXTRA)])
def test_every_arm_adapts(name):
    done = adapt(FewshotConfig(arm=name, shots=2, **TINY))
    record = done.record
    assert 0 <= record["dice"] <= 1 and record["steps"] == 3
    assert record["trained"] == S.count(done.start) and 0 < record["kept"] <= record["trained"]
    assert S.digest(done.state) != S.digest(done.start)
    json.dumps(record)


def test_a_run_is_decided_by_its_config():
    first, again, other = (adapt(FewshotConfig(shots=2, split=s, **TINY)).state for s in (0, 0, 1))
    assert S.digest(first) == S.digest(again) != S.digest(other)


def test_from_scratch_starts_at_random_weights_and_full_at_the_base():
    scratch, full = (adapt(FewshotConfig(arm=name, shots=1, **TINY)).start for name in ("scratch", "full"))
    name = "encoder.blocks.0.qkv.weight"
    assert not torch.equal(scratch[name], full[name])


def test_arena_drops_directions_and_kept_counts_them():
    strong = FewshotConfig(arm="arena-4", shots=2, steps=8, batch=2, changes=(("lam", 1e3),))
    done = adapt(strong)
    assert done.record["rank"] == 0 and done.record["nuclear"] == 0
    assert done.record["kept"] == sum(v.numel() for n, v in done.state.items() if n.startswith("head."))
    weak = adapt(replace(strong, changes=(("lam", 0.0),))).record
    assert weak["rank"] == 4 * len(weak["ranks"]) and weak["kept"] == weak["trained"]


def test_an_option_that_nothing_takes_is_refused():
    with pytest.raises(FedloraError, match="training option of adapter 'lora' 'lam'"):
        companions("lora", lam=1.0)
    with pytest.raises(FedloraError, match=r"training option of adapter 'pego' 'block'.*Did you mean 'blocks'"):
        companions("pego", block=1)
    for name, change in (("lora-4", {"lam": 1}), ("arena-8", {"lambda": "x"})):
        with pytest.raises(
            FedloraError, match=f"unknown training option of adapter '.*' '{next(iter(change))}'; accep"
        ):
            arm(name).objective(**change)
    with pytest.raises(FedloraError, match="option 'lam' of 'ARENA r=8' is a finite number, got 'x'"):
        arm("arena-8").objective(lam="x")


def test_training_ends_when_the_loss_stands_still():
    plateau = Plateau(window=2, patience=4, least=0.1)
    falling = [plateau(i, [10.0 - i]) for i in range(8)]
    assert not any(falling)
    standing = [plateau(i, [2.0]) for i in range(8, 20)]
    assert standing.index(True) == 5  # four steps later the mean over two has moved by less than 0.1
    assert not any(standing[:5])


@pytest.fixture
def study(tmp_path):
    return Study(["vessel"], ["head", "arena-4"], [1, 2], [0, 1], tmp_path / "study", (1e-3, 1e-2), dict(TINY))


@pytest.mark.slow
def test_rates_are_chosen_on_the_tuning_task_alone(study):
    results = study.run()
    searched = read_lines(study.folder / "search.jsonl")
    assert {r["config"]["task"] for r in searched} == {"kidneys-shifted"}
    assert {r["config"]["split"] for r in searched} == set(fewshot.SEARCH_SPLITS)
    for name in ("head", "arena-4"):
        tried = {r["config"]["lr"]: r["dice"] for r in searched if r["config"]["arm"] == name}
        assert set(tried) == {1e-3, 1e-2}
        assert {r["config"]["lr"] for r in results if r["config"]["arm"] == name} == {max(tried, key=tried.get)}
    assert len(results) == 2 * 2 * 2


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(study, monkeypatch):
    results = study.run()
    path = study.folder / "runs.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - 40])  # killed in the middle of the last line
    calls = []
    monkeypatch.setattr(fewshot, "adapt", lambda config: calls.append(config) or adapt(config))
    again = Study(study.tasks, study.arms, study.shots, study.splits, study.folder, study.rates, study.settings).run()
    assert len(calls) == 1
    assert [(r["config"]["arm"], r["dice"], r["loss"]) for r in again] == [
        (r["config"]["arm"], r["dice"], r["loss"]) for r in results
    ]
    assert len(read_lines(path)) == len(results)


def test_a_tuning_task_is_not_reported(tmp_path):
    with pytest.raises(FedloraError, match="for tuning"):
        Study(["kidneys-shifted"], ["head"], [1], [0], tmp_path)


def fake(arm, split, dice, task="vessel", shots=5, **more):
    config = {"arm": arm, "split": split, "task": task, "shots": shots, "lr": 1e-2}
    base = {
        "event": "result",
        "hd95": 1.0,
        "trained": 100,
        "kept": 50,
        "rank": 3,
        "steps": 9,
        "ranks": {"a": 1, "b": 2},
    }
    return base | {"config": config, "dice": dice} | more


def results():
    rng, out = np.random.default_rng(0), []
    for split in range(6):
        for task_ in ("vessel", "vessel-shifted"):
            noise = 0.01 * rng.random()
            out += [fake(f"lora-{r}", split, 0.5 + 0.02 * i + noise, task_) for i, r in enumerate((4, 8, 16, 32))]
            out += [fake(f"arena-{r}", split, 0.7 + noise, task_) for r in (4, 8, 16, 32)]
    return out


def test_tables_are_splits_by_tasks():
    table = report.table_of(results(), "arena-8", 5)
    assert table.shape == (6, 2)
    spread = report.table_of(results(), "lora-4|lora-8|lora-16|lora-32", 5, "range of dice")
    assert np.allclose(spread, 0.06)
    assert report.table_of(results(), "arena-8@vessel", 5).shape == (6, 1)
    assert np.allclose(report.table_of(results(), "arena-8", 5, "log kept / trained"), np.log(0.5))
    with pytest.raises(FedloraError, match="does not have every split on every task"):
        report.table_of(results()[1:], "lora-4", 5)


def test_verdicts_read_few_shot_results(tmp_path, monkeypatch):
    lines = "".join(json.dumps(r) + "\n" for r in results())
    (tmp_path / "fewshot_phantom.jsonl").write_text(lines)
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path))
    names = ("arena-over-lora-5", "arena-flat-in-rank")
    found = claims.verdicts({name: claims.CLAIMS[name] for name in names})
    assert [found[name].word for name in names] == ["supported", "supported"]
    text = found["arena-over-lora-5"]._repr_markdown_()
    assert "6 splits × 2 tasks" in text and "ARENA r=8 − LoRA r=8" in text


def test_the_report_has_a_table_and_a_picture_for_every_number_of_shots(tmp_path):
    both = [*results(), fake("lora-4", 0, 0.4, shots=1)]
    text, pictures = report.write_report(both, tmp_path)
    assert text.read_text().count("| arm |") == 2
    assert [p.name for p in pictures] == ["frontier-1.png", "frontier-5.png"]
    assert all(p.stat().st_size > 10_000 for p in pictures)
    assert report.by_layer(results(), "arena-8", 5).loc["b", "vessel"] == 2


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ARMS, "lora-1", Arm("LoRA r=1", "lora", {"rank": 1}))
    assert cli.main(["fewshot", "--list"]) == 0
    assert "nuclei-he" in capsys.readouterr().out
    command = ["fewshot", "head", "lora-1", "--shots", "1", "--splits", "0", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert "linear probe" in capsys.readouterr().out
    assert cli.main(["fewshot", "lorra", "--out", str(tmp_path)]) == 2
    assert "unknown arm 'lorra'" in capsys.readouterr().err
    assert cli.main(["adapters"]) == 0
    assert "adalora" in capsys.readouterr().out


def test_a_search_looks_at_the_splits_that_it_is_given(tmp_path):
    own = Study(["vessel"], ["head"], [1], [0], tmp_path / "study", (1e-3, 1e-2), dict(TINY), searched=(1001,))
    own.run()
    assert {r["config"]["split"] for r in read_lines(own.folder / "search.jsonl")} == {1001}
