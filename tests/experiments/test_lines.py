"""The modules that write records take a file's name, and no option for one."""

import runpy
import sys

import pytest

MODULES = ("counterfactual", "raters", "side_by_side", "unadapted", "nearness")


@pytest.mark.parametrize(
    ("module", "given", "code"),
    [
        *((module, ["--help"], 0) for module in MODULES),
        ("counterfactual", ["-h"], 0),
        ("counterfactual", ["--seeds"], 2),
        ("unadapted", ["x.jsonl", "--quick"], 2),
    ],
)
def test_an_option_in_the_place_of_the_file_gives_the_usage_and_writes_nothing(
    tmp_path, monkeypatch, capsys, module, given, code
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anything", *given])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"fedlora_mini.experiments.{module}", run_name="__main__", alter_sys=True)
    told = capsys.readouterr()
    said, other = (told.out, told.err) if code == 0 else (told.err, told.out)
    assert caught.value.code == code and not other and not list(tmp_path.iterdir())
    assert said.startswith(f"usage: python -m fedlora_mini.experiments.{module} FILE.jsonl")
