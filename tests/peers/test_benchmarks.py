"""The benchmarks still run: every script imports, and those of the server's rules call each rule."""

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers
pytest.importorskip("opacus", reason="the peers are not installed here: run `make peers`")

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """Scripts import `timing` from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_every_benchmark_imports_and_is_asked():
    asked = {question.script for question in importlib.import_module("run").QUESTIONS}
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"run", "timing"}
    assert asked == scripts
    assert all(callable(importlib.import_module(name).measure) for name in scripts)


@pytest.mark.parametrize("part", ["means", "best_pairs", "rules"])
def test_the_rules_of_the_server_run(monkeypatch, part):
    module = importlib.import_module("aggregation")

    def once(setting, reference, arms, **how):
        assert reference in arms
        return [{"arm": name, "result": act()} for name, act in arms.items()]

    monkeypatch.setattr(module, "compare", once)
    monkeypatch.setattr(module, "CLIENTS", 3)
    monkeypatch.setattr(module, "peak", lambda arm: 0.0)  # a fresh process each
    rows = getattr(module, part)()
    assert rows and all(row["result"] is not None for row in rows)
    sys.modules.pop("aggregation")
