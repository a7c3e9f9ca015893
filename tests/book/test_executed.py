"""A chapter is executed once, and the build shows the outputs of that execution."""

import os
from pathlib import Path
from typing import Any

import executed
import kernels
import nbformat
import notebooks
import project
import pytest
import yaml
from jupyter_cache import get_cache
from myst_nb.core.config import NbParserConfig
from myst_nb.core.read import create_nb_reader
from myst_parser.config.main import MdParserConfig

PAGE = """\
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
# Page

```{code-cell} ipython3
:tags: [hide-input]
print(1)
```

:::{note}
Text.
:::

```{code-cell} ipython3
print(2)
```
"""


def as_built(path: Path) -> Any:
    """The page as the build reads it, with the book's own settings."""
    settings = yaml.safe_load((project.ROOT / "_config.yml").read_text(encoding="utf-8"))["parse"]
    config = MdParserConfig(enable_extensions=set(settings["myst_enable_extensions"]))
    text = path.read_text(encoding="utf-8")
    return create_nb_reader(str(path), config, NbParserConfig(), text).read(text)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (tmp_path / "references.bib").write_text("")
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(project, "BOOK", tmp_path)
    monkeypatch.setattr(project, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(project, "cache_path", lambda: tmp_path / "cache")
    monkeypatch.setattr(notebooks, "chapters", lambda: ["page"])
    monkeypatch.setattr(notebooks, "open_book", lambda open_book=notebooks.open_book: open_book(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_build_finds_the_outputs_of_a_chapter_that_was_executed(book: Path) -> None:
    executed.run_missing(jobs=2)
    executed.fill(["page"])
    chapter = as_built(book / "page.md")
    _, filled = get_cache(str(project.cache_path())).merge_match_into_notebook(chapter)
    assert [c.outputs[0].text for c in filled.cells if c.cell_type == "code"] == ["1\n", "2\n"]
    assert filled.metadata.language_info.pygments_lexer == "ipython3"


def test_only_what_has_not_been_executed_is(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nb = notebooks.notebook(notebooks.open_book(), "page")
    executed.keep("page", nb)
    executed.run_missing(jobs=1)
    assert capsys.readouterr().out == ""
    (book / "page.md").write_text(PAGE.replace("Text.", "Other text."))
    assert executed.kept("page") is not None
    (book / "page.md").write_text(PAGE.replace("print(2)", "print(3)"))
    assert executed.kept("page") is None


def test_a_chapter_that_fails_leaves_nothing(book: Path) -> None:
    (book / "page.md").write_text(PAGE.replace("print(2)", "1 / 0"))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        executed.run_missing(jobs=1)
    assert executed.kept("page") is None


@pytest.mark.parametrize("page", notebooks.chapters())
def test_the_build_reads_the_cells_that_the_notebook_has(page: str, tmp_path: Path) -> None:
    """Otherwise it would look for outputs under another key, and execute the chapter again."""
    path, cache = project.BOOK / f"{page}.md", get_cache(str(tmp_path))
    stored = nbformat.read(project.NOTEBOOKS / f"{page}.ipynb", as_version=4)
    built = as_built(path)
    assert cache.create_hashed_notebook(built)[1] == cache.create_hashed_notebook(executed.as_built(path))[1]
    assert [c.source for c in executed.code_cells(built)] == [c.source for c in executed.code_cells(stored)]


def test_kernels_do_not_share_an_address() -> None:
    first, second = kernels.LocalKernel(), kernels.AsyncLocalKernel()
    assert first.transport == second.transport == ("ipc" if os.name == "posix" else "tcp")
    assert first.ip != second.ip or os.name != "posix"
