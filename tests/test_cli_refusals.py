"""What the command line does not take: one line that says what it takes, status 2, nothing written and nothing lost."""

import json
import runpy
import stat
import sys

import pytest

from fedlora_mini.cli import main
from fedlora_mini.experiments.fewshot import Study

SMALL = "--sites 2 --size 32 --rounds 1 --steps 1 --batch 2 --rank 2 --threads 1"
TINY = f"{SMALL} --option per_site=6 --option val=2 --option test=3".split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


REFUSED = [
    # privacy options where nothing is private
    *((f"run fedit {option}", f"{option.split()[0]} needs --epsilon or --sigma") for option in (
        "--clip 2", "--unit client", "--delta 1e-6", "--secure", "--quantile 0.5", "--clipping flat",
        "--accountant pld", "--micro 8",
    )),
    ("run fedit --epsilon 3 --quantile 0.5", "--quantile needs --unit client"),
    ("compare fedit --clip 2", "--clip needs --epsilon or --sigma"),
    ("run fedit --clip 0", "--clip needs --epsilon or --sigma"),
    ("run fedit --delta 0", "--delta needs --epsilon or --sigma"),
    ("--import nothing.py run fedit", "--import 'nothing.py' is no Python file"),
    (f"--import {__file__} network fedit", "--import is not for `network`: its nodes are processes of their own"),
    # numbers
    ("run fedit --sigma inf", "sigma must be finite"),
    ("run fedit --dirichlet nan", "dirichlet must be positive and finite"),
    ("run fedit --dirichlet inf", "dirichlet must be positive and finite"),
    ("network fedit --timeout inf", "--timeout must be a positive and finite number of seconds"),
    ("network fedit --timeout nan", "--timeout must be a positive and finite number of seconds"),
    ("run feddg --change ratio=5", "ratio must be in [0, 0.5]"),
    ("run feddg --change tau=0", "tau must be in (0, inf)"),
    ("run fedavgm --change inner=median", "setting 'inner' of"),
    ("run fedprox --change target=5", "setting 'target' of"),
    # what an option of the command says
    *((f"{command} --option {name}=3", f"use --{name}") for command in ("run fedit", "data show phantom")
      for name in ("size", "seed", "sites", "unseen")),
    ("run fedit --option name=3", "use --data"),
    ("run fedit --lr nan", "lr must be positive and finite, got nan"),
    ("run fedit --lr inf", "lr must be positive and finite, got inf"),
    ("run fedit --alpha 0", "alpha must be positive"),
    ("run fedit --alpha nan", "alpha must be positive"),
    ("run fedit --passes nan", "passes must be positive"),
    ("run fedit --weight-decay -1", "weight_decay must be at least 0"),
    ("run fedit --weight-decay nan", "weight_decay must be at least 0"),
    ("run fedit --threads 0", "threads must be at least 1"),
    ("run fedit --threads -1", "threads must be at least 1"),
    ("run fedit --seed -1", "seed must be from 0"),
    (f"run fedit --seed {2**64}", "seed must be from 0"),
    ("run fedit --size 1000000", "size must be from 8 to 4096"),
    ("data show phantom --size 1000000", "size must be from 8 to 4096"),
    ("run fedit --eval-every -1", "eval_every must be at least 0"),
    ("run fedit --dirichlet .5 --clients 0", "clients must be at least 1"),
    ("run fedit --epsilon inf", "epsilon must be positive and at most 10000"),
    ("run fedit --epsilon 1e9", "epsilon must be positive and at most 10000"),
    ("audit --epsilon inf", "epsilon must be positive and at most 10000"),
    ("run fedit --epsilon 3 --rounds 0", "epsilon needs rounds of at least 1"),
    *((f"run fedit --ranks {ranks}", "accepted: whole numbers such as 2,4,8") for ranks in ("2,x", "2,,4", ",")),
    *((f"compare fedit --search-lr {rates}", "--search-lr") for rates in ("nan", "abc", ",", "1e-3,1e-3", "-1")),
    ("private --rates a", "--rates 'a'"),
    ("compare fedit --seeds 0-2000000000", "at most 10,000 numbers"),
    ("compare fedit --seeds 5,3-1", "'3-1' runs backwards"),
    # contradictions
    ("compare fedit --lr 1e-3 --search-lr 1e-3,1e-2", "--lr and --search-lr"),
    ("compare fedit --search-on own-split", "--search-on needs --search-lr"),
    ("run fedit --steps 3 --passes 2", "--steps and --passes"),
    ("private --parts e1 --sharpness", "name both among --parts"),
    ("run fedit --change lam", "--change 'lam' is not understood"),
    # other commands
    ("pretrain --steps 0", "steps must be in [1, inf)"),
    ("pretrain --steps -2", "steps must be in [1, inf)"),
    ("pretrain --batch 0", "batch must be in [1, inf)"),
    ("pretrain --model vit", "model 'vit' is not made for segmentation"),
    ("pretrain --threads 0", "--threads must be at least 1"),
    ("fewshot head --patience 0", "patience must be in [2, inf)"),
    ("fewshot head --patience 1", "patience must be in [2, inf)"),
    ("fewshot head --threads 0", "threads must be in [1, inf)"),
    ("fewshot head --lr nan", "lr is a finite number"),
    ("fewshot arena-8 --change lam=abc", "option 'lam' of 'ARENA r=8' is a finite number, got 'abc'"),
    ("fewshot head --splits x", "splits 'x'"),
    ("fewshot head --shots x", "shots 'x'"),
    ("fewshot head --lr 1e-3 --search-lr 1e-3,1e-2", "--lr and --search-lr"),
    ("methods fedit --check --model unet3d", "is 3D, the images are 2D"),
    ("methods fedit --model vit", "model 'vit' is not made for segmentation"),
    ("audit --games 40 --canaries 40", "too few to convict anyone"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda text: text[:60])
def test_what_is_refused_is_told_in_one_line_and_leaves_nothing(words, message, capsys, tmp_path):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedlora: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--whole-unseen --unseen=", "whole_unseen needs a site that never trains"),
        ("--sites ²", "site '²'"),
        ("--data=", "data is the name of a data set"),
    ],
)
def test_words_of_a_run_that_name_nothing_are_refused(words, message, capsys, tmp_path):
    assert main(["run", "fedit", *TINY, *words.split(), "--out", "made"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_no_ranks_at_all_are_refused(capsys):
    assert main(["run", "fedit", "--ranks", ""]) == 2 and "--ranks ''" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [["--fraction", "7"], ["--model", "unet3d"], ["--data", "phantm"]])
def test_a_run_that_cannot_be_built_makes_no_folder(changes, tmp_path):
    assert main(["run", "fedit", *TINY, *changes, "--out", "made"]) == 2
    assert not list(tmp_path.iterdir())


OUT = ["run fedit", "compare fedit", "report x.jsonl", "fewshot head", "private", "network fedit --sigma 1 --secure"]


@pytest.mark.parametrize("words", OUT)
def test_a_file_is_no_folder_to_write_to(words, capsys, tmp_path):
    for file in ("taken", "x.jsonl"):
        (tmp_path / file).write_text("mine")
    for out in ("taken", "taken/inside"):
        assert main([*words.split(), "--out", out]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"cannot write to '{out}'" in error and "is a file" in error
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_base_needs_the_name_of_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert main(["pretrain", "--out", str(tmp_path)]) == 2 and "it is a folder" in capsys.readouterr().err
    assert main(["pretrain", "--out", "taken/base.safetensors"]) == 2 and "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1}', "has no configuration"),
        ("[1, 2]", "is no record"),
        ("3", "is no record"),
        ('{"config": {"met', "line 1 of 'x.jsonl' is damaged"),
        ('{"config": {}}', "a record of no method"),
        ('{"config": {"method": "fedid", "seed": 0}, "scores": {"personal": {"a": {"dice": 1}}}, "trained": 1, '
         '"bytes_up": [], "agg_err": [], "seconds": 1}', "Did you mean 'fedit'"),
        ('{"config": {"arm": "head", "shots": 1}}', "few-shot"),
        ('{"event": "raters"}', "records of another kind: raters"),
        ('{"config": {"method": "fedit"}, "val_dice": 0.5}', "a run of a search"),
        ('{"config": {"method": "fedit"}, "scores": {"server": {}}}', "a measurement without test scores"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_named(line, message, capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    assert main(["report", "x.jsonl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_folder_of_another_run_is_refused_and_kept(capsys, tmp_path):
    assert main(["run", "fedit", *TINY, "--out", "here"]) == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o666 & ~_umask()}
    capsys.readouterr()
    assert main(["run", "ffa", *TINY, "--out", "here"]) == 2
    assert "holds another run's result" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "here").iterdir()} == kept
    assert main(["run", "fedit", *TINY, "--out", "here"]) == 0
    (tmp_path / "here/result.json").write_text('{"event": "resu')
    assert main(["run", "fedit", *TINY, "--out", "here"]) == 2
    assert "result.json' is damaged" in capsys.readouterr().err


def _umask():
    import os

    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("damage", [b"", b"\x10\x00", None])
def test_a_damaged_checkpoint_is_named(damage, capsys, tmp_path, monkeypatch):
    from fedlora_mini.cli import runs

    def stop(record):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "progress", lambda *args: stop)
    words = ["run", "fedit", *TINY, "--rounds", "2", "--out", "here"]
    assert main(words) == 130 and "goes on from the last finished round" in capsys.readouterr().err
    file = tmp_path / "here/checkpoint.safetensors"
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()
    file.write_bytes(file.read_bytes()[:-50] if damage is None else damage)
    assert main(words) == 2
    assert "checkpoint.safetensors' is damaged" in capsys.readouterr().err


def test_a_run_that_its_budget_stops_says_so(capsys):
    words = ["run", "fedit", *TINY, "--rounds", "3", "--sigma", "1", "--epsilon", "2", "--steps", "2"]
    assert main(words) == 0
    assert "stopped: fedit seed 0: round " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["pretrain", "audit", "methods", "models"])
def test_an_interrupted_command_that_begins_again_does_not_promise_to_go_on(command, capsys, monkeypatch):
    from fedlora_mini import cli

    def interrupted(args):
        raise KeyboardInterrupt

    whole = cli.parser()
    monkeypatch.setattr(cli, "parser", lambda: whole)
    whole._subparsers._group_actions[0].choices[command].set_defaults(act=interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == "\nfedlora: interrupted\n"


def test_no_option_may_be_abbreviated(capsys):
    for words in (["run", "fedit", "--round", "3"], ["data", "show", "phantom", "--siz", "32"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_comparison_keeps_what_its_folder_held(tmp_path):
    for words in (["ffa"], ["fedit"], ["ffa"]):
        assert main(["compare", *words, *TINY, "--seeds", "0", "--out", "here"]) == 0
    lines = (tmp_path / "here/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["config"]["method"] for line in lines] == ["ffa", "fedit"]


def test_a_few_shot_study_keeps_what_its_folder_held_and_names_a_damaged_line(tmp_path, capsys):
    for arm in ("head", "bitfit"):
        Study(["vessel"], [arm], [1], [0], tmp_path, (1e-2,), {"steps": 2}).run()
    for name in ("results.jsonl", "runs.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["config"]["arm"] for line in lines] == ["head", "bitfit"]
    (tmp_path / "runs.jsonl").write_text(lines[0][:99] + "\n" + lines[1] + "\n")
    assert main(["fewshot", "head", "--shots", "1", "--out", str(tmp_path)]) == 2
    assert "runs.jsonl' is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["counterfactual", "nearness", "raters", "side_by_side", "unadapted"])
def test_a_module_that_writes_records_asks_for_the_file(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit, match=rf"usage: python -m fedlora_mini\.experiments\.{module} FILE\.jsonl"):
        runpy.run_module(f"fedlora_mini.experiments.{module}", run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("words", ["hetlora flexlora --ranks 1,2", "iat_sor fedsa_sor --change lam=0.01"])
def test_what_fits_every_arm_of_a_comparison_need_not_fit_fedit(words, tmp_path):
    """Not even for the name of a folder that nobody gave."""
    assert main(["compare", *words.split(), *TINY, "--seeds", "0"]) == 0
    [file] = tmp_path.glob("runs/compare-phantom-*/results.jsonl")
    assert len(file.read_text().splitlines()) == 2
