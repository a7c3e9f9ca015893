"""The command line as a stranger meets it."""

import json
import subprocess
import sys

import pytest

from fedlora_mini.cli import main
from fedlora_mini.data import DATASETS
from fedlora_mini.federation import METHODS
from fedlora_mini.models import MODELS

TINY = [
    "--sites",
    "2",
    "--size",
    "32",
    "--rounds",
    "2",
    "--steps",
    "2",
    "--batch",
    "2",
    "--rank",
    "2",
    "--threads",
    "1",
]
TINY += ["--option", "per_site=6", "--option", "val=2", "--option", "test=3"]


@pytest.mark.slow
def test_the_method_table_shows_the_rows_asked_for(capsys):
    """All of them without a name; tests/experiments/test_table.py runs every row."""
    assert main(["methods", "fedit", "iat", "local"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["fedit", "iat", "local"]
    assert "B of encoder, A of decoder, head" in next(line for line in lines if line.startswith("iat"))


@pytest.mark.slow
def test_the_check_says_that_rows_do_what_they_say(capsys):
    assert main(["methods", "fedit", "fedalt", "--check"]) == 0
    assert capsys.readouterr().out.count("as it says") == 2
    assert main(["methods", "fedid"]) == 2
    assert "Did you mean 'fedit'?" in capsys.readouterr().err


def test_models_and_data_are_listed(capsys):
    assert main(["models"]) == 0 and main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "swin_unetr3d" in out and "phantom" in out and "CC0" in out


def test_a_run_ends_with_a_table_and_names_its_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", "fedit", *TINY, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "| FedIT |" in out and str(folder) in out
    assert (folder / "final.safetensors").exists() and not (folder / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_comparison_ends_with_tables_and_a_figure(tmp_path, capsys):
    folder = tmp_path / "comparison"
    assert main(["compare", "local", "iat", *TINY, "--seeds", "0-1", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "IAT sharing − local only" in out
    assert (folder / "report.png").exists() and (folder / "report.md").read_text() in out
    assert main(["report", str(folder), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/report.md").read_text() == (folder / "report.md").read_text()


def test_an_audit_convicts_the_broken_mechanisms_and_not_the_right_one(capsys):
    assert main(["audit", "--games", "2000", "--canaries", "400"]) == 0
    told = {line.split("  ")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:-1]}
    assert told.pop("as it should be") == "false" and list(told.values()) == ["true"] * 3


@pytest.mark.slow
def test_data_show_writes_a_gallery(tmp_path, capsys):
    picture = tmp_path / "gallery.png"
    assert main(["data", "show", "phantom", "--size", "32", "--option", "per_site=8", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "site1" in capsys.readouterr().out


def test_data_check_lists_problems_and_says_so_in_its_exit_status(tmp_path, capsys):
    import numpy as np
    from PIL import Image

    for site in ("a", "b"):
        for part in ("images", "masks"):
            (tmp_path / site / part).mkdir(parents=True)
    for i in range(8):
        picture = np.random.default_rng(i).integers(0, 255, (20, 20), dtype=np.uint8)
        for site in ("a", "b"):
            Image.fromarray(picture).save(tmp_path / site / "images" / f"{i}.png")
            Image.fromarray(((picture > 128) * 255).astype(np.uint8)).save(tmp_path / site / "masks" / f"{i}.png")
    assert main(["data", "check", str(tmp_path)]) == 0
    (tmp_path / "b" / "masks" / "3.png").unlink()
    (tmp_path / "b" / "images" / "4.png").write_bytes(b"broken")
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "3.png" in out and "4.png" in out
    assert main(["run", "fedit", "--data", str(tmp_path), "--size", "32"]) == 2
    assert "fedlora data check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "fedid"], "Did you mean 'fedit'"),
        (["run", "fedit", "--data", "nuklei"], "Did you mean 'nuclei'"),
        (["run", "fedit", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["run", "fedit", "--device", "tpu"], "unknown device 'tpu'"),
        (["run", "fedit", "--option", "per_site"], "NAME=VALUE"),
        (["run", "fedit", "--sigma", "1", "--micro", "0"], "micro must be at least 1, got 0"),
        (["compare", "local", "--seeds", "x"], "seeds 'x'"),
        (["compare", "local", "--search-on", "own"], "Did you mean 'own-split'?"),
        (["report", "/nowhere"], "holds no result"),
        (["data", "fetch", "phantom"], "nuclei"),
        (["data", "show"], "needs a name"),
        (["data", "check", "phantom"], "'phantom' is a built-in data set"),
        (["data", "prepare", "nuclei", "--size", "0"], "'nuclei' has no size 0"),
        (["data", "fetch", "nuclei", "--size", "20"], "'nuclei' has no size 20"),
        (["data", "show", "phantom", "--seed", "-1"], "seed is a whole number"),
        (["data", "show", "phantom", "--seed", str(2**64)], "seed is a whole number"),
        (["data", "show", "phantom", "--option", "per_site=abc"], "'per_site' of data set 'phantom'"),
        (["run", "fedprox", "--change", "mu=abc"], "setting 'mu'"),
        (["run", "resfim", "--change", "tau=2"], "tau must be in [0, 1]"),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedlora: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("out", ["/nope/x.png", "x.xyz"])
def test_a_gallery_that_cannot_be_written_is_one_line(out, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny = ["--size", "16", "--option", "per_site=2", "--option", "val=1", "--option", "test=1"]
    assert main(["data", "show", "phantom", *tiny, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedlora: cannot write --out '{out}'") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("list", "ready"),
        ("fetch", "unless that is done"),
        ("prepare", "made anew"),
        ("show", "draws the splits"),
        ("check", "before anything trains"),
    ],
)
def test_every_data_action_has_help_of_its_own(action, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", action, "--help"])
    assert stop.value.code == 0 and said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["list", "foo"], ["check", "x", "--size", "32"], ["list", "--seed", "1"]])
def test_a_data_action_refuses_what_it_does_not_read(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", *words])
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["compare"], ["report"], ["data"], ["pretrain"]])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: fedlora" in out
    if command and command[0] in ("run", "compare", "report", "data"):
        assert "example" in out


OWN = """
from dataclasses import replace

from torch import nn

from fedlora_mini.data import DATASETS, load
from fedlora_mini.data.registry import Entry
from fedlora_mini.federation import METHODS
from fedlora_mini.models import zoo

METHODS["mine"] = replace(METHODS["iat"], title="my own row")
DATASETS["rooms"] = Entry("own_parts", "simulated sites under another name", "simulated", "MIT")
zoo.MODELS["thin"] = zoo.Entry(
    lambda classes, channels: nn.Sequential(nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, classes, 1)),
    (("^0", "encoder"), ("^1", "decoder"), ("^2", "head")), 2, 1, 16, "three convolutions",
)


def load_rooms(*, size=64, seed=0, doors: int = 2):
    return replace(load("phantom", size=size, seed=seed, sites=doors, per_site=6, val=2, test=3), name="rooms")
"""


def test_a_file_of_one_s_own_adds_a_row_a_data_set_and_a_network(tmp_path, monkeypatch, capsys):
    """README's account: by name in every command that is given the file, and in none that is not."""
    for table in (METHODS, DATASETS, MODELS):
        for name in ("mine", "rooms", "thin"):
            monkeypatch.setitem(table, name, None)  # so that each is as before afterwards
            monkeypatch.delitem(table, name)
    monkeypatch.setitem(sys.modules, "own_parts", None)
    monkeypatch.delitem(sys.modules, "own_parts")
    file = tmp_path / "own_parts.py"
    file.write_text(OWN, encoding="utf-8")
    words = ["run", "mine", "--data", "rooms", "--option", "doors=3", "--model", "thin", "--base", "none", *TINY[2:14]]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "unknown method 'mine'" in capsys.readouterr().err
    assert main(["--import", str(file), *words, "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(record["sites"]) >= 3 and "my own row" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert main(["--import", str(file), "methods"]) == 2
    assert "there is a module 'own_parts' already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_installed_command_is_the_same():
    out = subprocess.run(
        [sys.executable, "-m", "fedlora_mini.cli", "methods", "fedsa"], capture_output=True, text=True, check=True
    )
    assert "fedsa" in out.stdout
