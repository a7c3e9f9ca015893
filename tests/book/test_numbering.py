"""Numbers in the notebooks are the numbers of the rendered pages: a small book is built with the real settings."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import notebooks
import project
import pytest
import yaml
from labels import Book

FRONT = "---\nfile_format: mystnb\nkernelspec: {display_name: Python 3, language: python, name: python3}\n---\n"

CHAPTER = """\
(ch-NAME)=
# Chapter NAME

$$
a = b
$$

$$
a &= b \\\\\\\\
c &= d
$$ (eq-NAME-1)

```{math}
:label: eq-NAME-2
c = d
```

````{prf:theorem} First
:label: thm-NAME
Inside, an equation:

```{math}
:label: eq-NAME-3
e = f
```
````

```{prf:lemma}
:label: lem-NAME
Text.
```

```{prf:theorem}
:label: thm-NAME-2
Text.
```

```{figure} dot.svg
:name: fig-NAME
A dot.
```

```{table} Numbers
:name: tab-NAME

| a | b |
|---|---|
| 1 | 2 |
```

```{exercise} Do it
:label: ex-NAME
Text.
```

```{solution} ex-NAME
:class: dropdown
Text.
```

```{exercise}
:label: ex-NAME-2
Text.
```

Links: {eq}`eq-NAME-1`, {eq}`eq-NAME-2`, {eq}`eq-NAME-3`, {prf:ref}`thm-NAME`, {prf:ref}`lem-NAME`,
{prf:ref}`thm-NAME-2`, {numref}`fig-NAME`, {numref}`tab-NAME`, {ref}`ex-NAME`,
{ref}`ex-NAME-2`, {ref}`ch-NAME`, {doc}`OTHER`.
"""

PAGES = {"start": "plain", "plain": "start", "one": "two", "two": "three", "three": "one"}
TOC = {
    "format": "jb-book",
    "root": "start",
    "parts": [
        {"caption": "Start", "chapters": [{"file": "plain"}]},
        {"caption": "I", "numbered": True, "chapters": [{"file": "one"}, {"file": "two"}]},
        {"caption": "II", "numbered": True, "chapters": [{"file": "three"}]},
    ],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of five pages, built as the real one is, without executing anything."""
    root = tmp_path_factory.mktemp("small")
    folder = root / "book"
    (folder / "_assets").mkdir(parents=True)
    for name in ("book.css", "favicon.svg"):
        (folder / "_assets" / name).write_bytes((project.BOOK / "_assets" / name).read_bytes())
    (folder / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>')
    (folder / "references.bib").write_text("")
    (folder / "_toc.yml").write_text(yaml.safe_dump(TOC))
    for page, other in PAGES.items():
        text = CHAPTER.replace("NAME", page).replace("OTHER", other)
        (folder / f"{page}.md").write_text(FRONT + text)
    config = yaml.safe_load((project.ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    config["sphinx"]["local_extensions"] = {"book_assets": str(project.BOOK / "_ext")}
    (root / "_config.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(folder)]
    command += ["--config", str(root / "_config.yml"), "--path-output", str(root / "build"), "-W", "--keep-going"]
    done = subprocess.run(command, env=os.environ | project.kernel_environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def link_texts(source: str) -> list[str]:
    """Texts of the links in the paragraph that starts with "Links:"."""
    paragraph = re.search(r"<p>Links: (.*?)</p>", source, re.S)
    assert paragraph
    links = re.findall(r"<a [^>]*>(.*?)</a>", paragraph[1], re.S)
    return [html.unescape(re.sub(r"<[^>]+>", "", link)) for link in links]


@pytest.mark.parametrize("page", PAGES)
def test_a_link_shows_the_same_number_in_page_and_notebook(small: Path, page: str) -> None:
    rendered = link_texts((small / "build/_build/html" / f"{page}.html").read_text(encoding="utf-8"))
    text = "\n".join(c.source for c in notebooks.notebook(Book(small / "book"), page).cells)
    plain = re.findall(r"\[([^\]]+)\]\([^)]*\)", text[text.index("Links:") :])
    assert len(plain) == 12
    # a rendered chapter's title and an exercise's title may follow the number; the number is what has to agree
    shown = [re.match(r"(\(?[A-Z]\w*\.? )?\(?[\d.]+\)?|.*", s, re.S)[0].strip() for s in rendered]  # type: ignore[index]
    assert shown[:-2] == plain[:-2]
    assert [re.sub(r"^[\d.]+ ", "", s) for s in rendered[-2:]] == plain[-2:]


@pytest.mark.parametrize("page", PAGES)
def test_theorems_captions_and_equations_carry_their_number(small: Path, page: str) -> None:
    rendered = (small / "build/_build/html" / f"{page}.html").read_text(encoding="utf-8")
    text = "\n".join(c.source for c in notebooks.notebook(Book(small / "book"), page).cells)
    assert re.findall(r'class="eqno">\(([\d.]+)\)', rendered) == re.findall(r"\\tag\{([\d.]+)\}", text)
    for name in ("Theorem", "Lemma", "Exercise", r"Fig\.", "Table"):
        heads = re.findall(rf'class="caption-number">\s*{name}\s+(\d[\d.]*)', rendered)
        assert heads and heads == re.findall(rf"\*\*{name} (\d+(?:\.\d+)*)", text), name


def test_colab_opens_the_notebook_and_the_page_asks_nobody(small: Path) -> None:
    source = (small / "build/_build/html/one.html").read_text(encoding="utf-8")
    links = set(re.findall(r'href="(https://colab[^"]*)"', source))
    s = project.settings()
    path = s["repository_url"].removeprefix("https://github.com/")
    assert links == {
        f"https://colab.research.google.com/github/{path}/blob/{s['repository_branch']}/book/notebooks/one.ipynb"
    }
    loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link[^>]*stylesheet[^>]* href="([^"]*)"', source)
    assert loaded and not [url for pair in loaded for url in pair if "//" in url]
    assert "sphinx-thebe.js" not in source
    scripts = re.findall(r'<script[^>]* src="([^"?]*)', source)
    assert len(scripts) == len(set(scripts))
    mathjax = small / "build/_build/html/_static/mathjax"
    assert (mathjax / "tex-mml-chtml.js").exists()
    assert sum(f.stat().st_size for f in mathjax.rglob("*") if f.is_file()) < 2_000_000


def test_small_book_makes_valid_notebooks(small: Path) -> None:
    book = Book(small / "book")
    for page in PAGES:
        nbformat.validate(notebooks.notebook(book, page))
