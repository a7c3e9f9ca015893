"""Rules that hold over the book's files: one address, no dead sliders, no missing page, no network."""

import re
import subprocess
from functools import cache
from pathlib import Path

import labels
import project
import pytest
import yaml

PAGES = sorted(project.BOOK.glob("*.md"))
BARE_WIDGETS = re.compile(
    r"\bimport ipywidgets|from ipywidgets|\binteract(ive|_manual)?\b\s*\(|\bwidgets\.\w*(Slider|Dropdown|Button|Text)"
)


def tracked() -> list[Path]:
    """Files of the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=project.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [project.ROOT / name for name in done.stdout.split("\0") if name]


def test_the_address_is_stated_once() -> None:
    address = project.settings()["repository_url"].removeprefix("https://").encode()
    holders = {
        path.relative_to(project.ROOT).as_posix()
        for path in tracked()
        if path.is_file() and path.suffix != ".ipynb" and address in path.read_bytes()
    }
    assert holders == {"pyproject.toml"}


def test_install_line_and_colab_link_follow_the_address(tmp_path: Path) -> None:
    text = '[tool.fedlora]\nrepository_url = "https://github.com/a/b/"\nrepository_branch = "dev"\n'
    (tmp_path / "pyproject.toml").write_text(text)
    assert project.settings(tmp_path)["repository_url"] == "https://github.com/a/b"
    assert project.install_line(tmp_path) == "git+https://github.com/a/b@dev"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_bare_ipywidgets(page: Path) -> None:
    """They show nothing in the rendered page, or a slider that moves nothing. Use fedlora_mini.widgets."""
    assert not BARE_WIDGETS.search(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "bad", ["interact(f, x=1)", "interactive(f)", "widgets.FloatSlider()", "import ipywidgets as w"]
)
def test_the_rule_finds_bare_ipywidgets(bad: str) -> None:
    assert BARE_WIDGETS.search(bad)


def test_every_page_of_the_contents_exists_and_every_page_is_in_it() -> None:
    listed = {name for name, _ in labels.pages_of_toc(project.BOOK)}
    assert listed == {page.stem for page in PAGES}


def test_every_part_of_chapters_is_numbered() -> None:
    toc = yaml.safe_load((project.BOOK / "_toc.yml").read_text(encoding="utf-8"))
    for part in toc["parts"]:
        chapters = [entry["file"] for entry in part["chapters"] if re.match(r"\d", entry["file"])]
        assert not chapters or part.get("numbered"), part["caption"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_with_code_cells_is_a_notebook(page: Path) -> None:
    has_code = "{code-cell}" in page.read_text(encoding="utf-8")
    assert labels.is_chapter(page) == has_code, "front matter: jupytext (format_name: myst) and kernelspec"


@cache
def known() -> set[str]:
    """The keys of the bibliography."""
    return set(labels.Book(project.BOOK).citations)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_citations_are_in_the_bibliography(page: Path) -> None:
    keys = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text(encoding="utf-8"))
    assert {k.strip() for group in keys for k in group.split(",")} <= known()


def test_own_assets_load_nothing_from_elsewhere() -> None:
    for path in (project.BOOK / "_assets").iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text and "@import" not in text, path.name


def test_the_cache_path_changes_with_the_package_and_the_results(tmp_path: Path) -> None:
    (tmp_path / "fedlora_mini").mkdir()
    (tmp_path / "results").mkdir()
    seen = {project.source_hash(tmp_path)}
    for name in ("fedlora_mini/a.py", "fedlora_mini/b.js", "results/run.jsonl"):
        (tmp_path / name).write_text("1")
        seen.add(project.source_hash(tmp_path))
    (tmp_path / "fedlora_mini/a.py").write_text("2")
    seen.add(project.source_hash(tmp_path))
    assert len(seen) == 5
    (tmp_path / "fedlora_mini/__pycache__").mkdir()
    (tmp_path / "fedlora_mini/__pycache__/a.pyc").write_text("x")
    assert project.source_hash(tmp_path) in seen


def test_kernels_see_the_checkout_and_a_fixed_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env = project.kernel_environment(threads=2)
    assert env["OMP_NUM_THREADS"] == "2" and env["PYTHONPATH"].startswith(str(project.ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert project.kernel_environment()["OMP_NUM_THREADS"] == "1"
