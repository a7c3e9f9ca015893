"""The chapters as plain notebooks: `python book/_tools/notebooks.py [--execute] [--check] [page ...]`.

book/<page>.md is the source; book/notebooks/<page>.ipynb is what Colab opens, students download and nbval runs.
Without `--execute`, outputs that are already stored are kept as long as no code of the page has changed.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import project
from flatten import Flattener, MarkupError, anchor
from labels import Book, is_chapter, read_chapter

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # a random id of an object that no longer exists

SETUP = """\
# Set-up. In Colab this installs the book's library once; anywhere else it does nothing.
import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("fedlora_mini") is None:
    import subprocess
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    constraints = []  # what Colab brings stays as it is
    for name in ("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib", "pillow", "ipython", "ipywidgets"):
        try:
            constraints.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            pass
    Path("constraints.txt").write_text("\\n".join(constraints) + "\\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    subprocess.run([*command, "INSTALL"], check=True)
"""


def chapters(folder: Path = project.BOOK) -> list[str]:
    return [path.stem for path in sorted(folder.glob("*.md")) if is_chapter(path)]


def open_book(folder: Path = project.BOOK) -> Book:
    repository = project.settings()["repository_url"]
    install = f"```sh\npip install {project.install_line()}\n```"
    return Book(folder, {"repository": repository, "install": install})


def notebook(book: Book, page: str) -> Any:
    """The page as a notebook without outputs: set-up cell, flattened text, code, references."""
    book.start(page)
    flat = Flattener(book, page)
    cells = [nbformat.v4.new_code_cell(SETUP.replace("INSTALL", project.install_line()).rstrip())]
    cells[0].metadata["tags"] = ["setup"]
    in_solution = False
    for cell in read_chapter(book.folder / f"{page}.md").cells:
        if cell.cell_type == "markdown":
            starts, ends = cell.source.rfind("{solution-start}"), cell.source.rfind("{solution-end}")
            in_solution = starts > ends if max(starts, ends) >= 0 else in_solution
            text = flat.cell(cell.source)
            if text:
                cells.append(nbformat.v4.new_markdown_cell(text, metadata=dict(cell.metadata)))
        elif cell.cell_type == "code":
            metadata = {k: v for k, v in cell.metadata.items() if k != "mystnb"}
            if in_solution:
                metadata["jupyter"] = {"source_hidden": True}
            cells.append(nbformat.v4.new_code_cell(cell.source, metadata=metadata))
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if figure.get("caption"):
                number = book.take(page, "figure")
                caption = flat.cell(figure["caption"])
                cells.append(
                    nbformat.v4.new_markdown_cell(f"{anchor(figure.get('name', ''))}**Fig. {number}.** {caption}")
                )
    if flat.cited:
        works = "\n".join(f"- {book.citations[key].line}" for key in sorted(flat.cited))
        cells.append(nbformat.v4.new_markdown_cell(f"## Works cited\n\n{works}"))
    seen: Counter[str] = Counter()
    for cell in cells:
        digest = hashlib.sha256(f"{page}\0{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(nb: Any, folder: Path, timeout: int = 600) -> None:
    """Run the notebook where it will lie, and store outputs without what changes from run to run."""
    from kernels import AsyncLocalKernel
    from nbclient import NotebookClient

    os.environ.update(project.kernel_environment())
    client = NotebookClient(
        nb, timeout=timeout, kernel_name="python3", store_widget_state=False, record_timing=False,
        kernel_manager_class=AsyncLocalKernel, resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute()
    nb.metadata.language_info = {"name": "python"}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            output.get("metadata", {}).pop(WIDGET_VIEW, None)


def sources(nb: Any) -> list[tuple[str, str, str, Any]]:
    """What has to agree between a chapter and its notebook."""
    return [(c.id, c.cell_type, c.source, c.metadata.get("tags")) for c in nb.cells]


def keep_outputs(nb: Any, old: Any) -> None:
    """Take stored outputs over if every code cell is still the same."""
    new_code, old_code = ([c for c in n.cells if c.cell_type == "code"] for n in (nb, old))
    if [c.source for c in new_code] == [c.source for c in old_code]:
        for new, previous in zip(new_code, old_code, strict=True):
            new.outputs, new.execution_count = previous.outputs, previous.execution_count


def drift(folder: Path = project.BOOK, only: list[str] | None = None) -> list[str]:
    """One line for each notebook that is not what its chapter says. Nothing is written or executed."""
    book, found = open_book(folder), []
    names = chapters(folder)
    for page in only or names:
        path = folder / "notebooks" / f"{page}.ipynb"
        if not path.exists():
            found.append(f"{path.name}: missing")
        elif sources(nbformat.read(path, as_version=4)) != sources(notebook(book, page)):
            found.append(f"{path.name}: differs from {page}.md")
    if not only:
        extra = {p.stem for p in (folder / "notebooks").glob("*.ipynb")} - set(names)
        found += [f"{page}.ipynb: no chapter of this name" for page in sorted(extra)]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="chapters without .md (default: all)")
    parser.add_argument("--execute", action="store_true", help="run the code and store the outputs")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is not up to date")
    args = parser.parse_args(arguments)

    known = chapters()
    unknown = [page for page in args.pages if page not in known]
    if unknown:
        print(f"no chapter '{unknown[0]}'; chapters: {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        if args.check:
            lines = drift(only=args.pages or None)
            print("\n".join(lines) or "notebooks agree with the chapters")
            if lines:
                print("to write them: python book/_tools/notebooks.py")
            return int(bool(lines))
        book = open_book()
        project.NOTEBOOKS.mkdir(exist_ok=True)
        for page in args.pages or known:
            path = project.NOTEBOOKS / f"{page}.ipynb"
            nb = notebook(book, page)
            if args.execute:
                execute(nb, project.NOTEBOOKS)
            elif path.exists():
                keep_outputs(nb, nbformat.read(path, as_version=4))
            nbformat.validate(nb)
            nbformat.write(nb, path)
            print(f"{path.relative_to(project.ROOT)}: {len(nb.cells)} cells")
    except MarkupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
