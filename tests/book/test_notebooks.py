"""The notebooks are what the chapters say, and bring their own set-up."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import nbformat
import notebooks
import project
import pytest
from labels import Book

PAGE = """\
---
file_format: mystnb
kernelspec: {display_name: Python 3, language: python, name: python3}
---
# Page

See {cite}`dice1945`.

```{code-cell} ipython3
:tags: [nbval-check-output, hide-input]
print(1)
```

```{exercise}
:label: ex
Print 2.
```

```{solution-start} ex
:class: dropdown
```

```{code-cell} ipython3
print(2)
```

```{solution-end}
```

```{code-cell} ipython3
---
mystnb:
  figure:
    caption: A {math}`x` curve.
    name: fig-x
---
print(2)
```
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "references.bib").write_text("@misc{dice1945, author={Dice, L.}, title={T}, year={1945}}")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def make(folder: Path) -> Any:
    return notebooks.notebook(Book(folder), "page")


def test_every_chapter_agrees_with_its_notebook() -> None:
    assert notebooks.drift() == [], "run: python book/_tools/notebooks.py --execute"


def test_stored_notebooks_hold_no_transient_data() -> None:
    for path in project.NOTEBOOKS.glob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        assert set(nb.metadata) == {"kernelspec", "language_info"}
        assert set(nb.metadata.language_info) == {"name"}
        for cell in nb.cells:
            assert set(cell.metadata) <= {"tags", "jupyter"}
            assert all(notebooks.WIDGET_VIEW not in o.get("data", {}) for o in cell.get("outputs", []))
        assert str(project.ROOT) not in path.read_text(encoding="utf-8")


def test_the_notebook_is_valid_and_its_ids_do_not_move(folder: Path) -> None:
    first = make(folder)
    nbformat.validate(first)
    ids = {c.id for c in first.cells}
    assert len(ids) == len(first.cells)
    (folder / "page.md").write_text(PAGE.replace("See {cite}", "New text. See {cite}"))
    assert len(ids - {c.id for c in make(folder).cells}) == 1, "an edit changes the id of its own cell only"


def test_tags_survive_and_solutions_and_captions_are_handled(folder: Path) -> None:
    cells = make(folder).cells
    code = [c for c in cells if c.cell_type == "code"]
    assert code[1].metadata["tags"] == ["nbval-check-output", "hide-input"]
    assert code[2].metadata["jupyter"] == {"source_hidden": True}
    assert "jupyter" not in code[3].metadata and "mystnb" not in code[3].metadata
    assert cells[-2].source == '<a id="fig-x"></a>\n**Fig. 1.** A $x$ curve.'
    assert cells[-1].source.startswith("## Works cited\n\n- L. Dice.")


def test_drift_sees_an_edit_a_missing_and_a_left_over_notebook(folder: Path) -> None:
    assert notebooks.drift(folder) == ["page.ipynb: missing"]
    nbformat.write(make(folder), folder / "notebooks" / "page.ipynb")
    assert notebooks.drift(folder) == []
    (folder / "page.md").write_text(PAGE.replace("print(1)", "print(3)"))
    assert notebooks.drift(folder) == ["page.ipynb: differs from page.md"]
    (folder / "page.md").unlink()
    (folder / "_toc.yml").write_text("format: jb-book\nroot: other\n")
    (folder / "other.md").write_text("# Other\n")
    assert notebooks.drift(folder) == ["page.ipynb: no chapter of this name"]


def test_outputs_stay_while_the_code_does(folder: Path) -> None:
    old = make(folder)
    old.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    (folder / "page.md").write_text(PAGE.replace("See {cite}", "Look at {cite}"))
    new = make(folder)
    notebooks.keep_outputs(new, old)
    assert new.cells[2].outputs == old.cells[2].outputs
    (folder / "page.md").write_text(PAGE.replace("print(1)", "print(3)"))
    new = make(folder)
    notebooks.keep_outputs(new, old)
    assert new.cells[2].outputs == []


def test_execution_stores_outputs_and_nothing_else(folder: Path) -> None:
    nb = make(folder)
    notebooks.execute(nb, folder)
    assert [c.outputs[0].text for c in nb.cells if c.get("outputs")] == ["1\n", "2\n", "2\n"]
    assert "execution" not in nb.cells[0].metadata and "widgets" not in nb.metadata


@pytest.mark.parametrize(("colab", "installed", "runs"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_set_up_installs_in_colab_only_and_keeps_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, colab: bool, installed: bool, runs: int
) -> None:
    monkeypatch.chdir(tmp_path)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    exec(compile(notebooks.SETUP.replace("INSTALL", project.install_line()), "set-up", "exec"), {})
    assert len(calls) == runs
    if runs:
        assert calls[0][-1] == project.install_line()
        pinned = Path("constraints.txt").read_text()
        assert "numpy==" in pinned and "ipywidgets==" in pinned


def test_unknown_chapter_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.main(["nothing"]) == 2
    assert "chapters:" in capsys.readouterr().err
