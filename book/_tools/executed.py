"""A chapter is executed once: by nbval or by `run`. The build takes the outputs of that execution.

They lie beside the build's own cache, in a folder whose name is a hash of the package and of the stored results; those
of a notebook whose code is no longer the chapter's are not used.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import notebooks
import project
from labels import read_chapter

LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}


def place(page: str) -> Path:
    return project.cache_path() / "notebooks" / f"{page}.ipynb"


def keep(page: str, nb: Any) -> None:
    """Store an executed notebook; the name appears when the file is whole."""
    path = place(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    nbformat.write(nb, unfinished)
    unfinished.replace(path)


def code_cells(nb: Any) -> list[Any]:
    """The chapter's own: without the set-up that only a notebook has."""
    return [c for c in nb.cells if c.cell_type == "code" and "setup" not in c.metadata.get("tags", [])]


def kept(page: str) -> Any | None:
    """The executed notebook, if its code is what the chapter says now."""
    if not place(page).exists():
        return None
    nb = nbformat.read(place(page), as_version=4)
    chapter = read_chapter(project.BOOK / f"{page}.md")
    same = [c.source for c in code_cells(nb)] == [c.source for c in code_cells(chapter)]
    return nb if same else None


def run(page: str) -> None:
    nb = notebooks.notebook(notebooks.open_book(), page)
    notebooks.execute(nb, project.NOTEBOOKS)
    keep(page, nb)
    print(f"executed {page}", flush=True)


def run_missing(jobs: int) -> None:
    """Execute the chapters of which no execution is kept, some at a time."""
    missing = [page for page in notebooks.chapters() if kept(page) is None]
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, missing):
            pass


def as_built(path: Path) -> Any:
    """The chapter as the build reads it: the cache's key depends on every option of a cell."""
    from myst_nb.core.read import myst_nb_reader_plugin

    return myst_nb_reader_plugin(str(path))


def fill(pages: list[str]) -> None:
    """Give the executed chapters to the cache that the build asks, under the keys that it will ask for."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    cache = get_cache(str(project.cache_path()))
    for page in pages:
        path = project.BOOK / f"{page}.md"
        chapter = as_built(path)
        for cell, executed in zip(code_cells(chapter), code_cells(kept(page)), strict=True):
            cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
        chapter.metadata["language_info"] = LANGUAGE
        cache.cache_notebook_bundle(CacheBundleIn(chapter, str(path)), check_validity=False, overwrite=True)
