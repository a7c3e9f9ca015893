"""Problem sets, student and solution version: `python book/_tools/assignments.py [--check] [set ...]`.

book/assignments/<set>.md is the source: MyST, plain Markdown in the text, nbgrader's metadata on the cells (a key that
is left out has nbgrader's default). solution/<set>.ipynb is nbgrader's source version, with every marker.
release/<set>.ipynb is the same without solutions and hidden tests. Neither holds outputs.
"""

import argparse
import copy
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import project
from flatten import ROLE, MarkupError, blocks
from labels import read_chapter
from notebooks import SETUP

FOLDER = project.BOOK / "assignments"
VERSIONS = ("release", "solution")
CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEXT_STUB = "YOUR ANSWER HERE"
DEFAULTS = {"grade": False, "solution": False, "task": False, "schema_version": 3}
TYPES: dict[str, Any] = {
    "grade": bool, "solution": bool, "locked": bool, "task": bool, "schema_version": int, "grade_id": str,
    "cell_type": str, "points": (int, float),
}  # fmt: skip


class AssignmentError(ValueError):
    """A problem set that cannot be graded: the set, the cell, what is wrong with it."""


def names(folder: Path = FOLDER) -> list[str]:
    return [path.stem for path in sorted(folder.glob("set*.md"))]


def graded(cell: Any) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


def is_solution(cell: Any) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def needs_solution(cell: Any) -> bool:
    """Whether the cell fails in the student version: it holds a solution, checks one, or is tagged as using one."""
    mine = graded(cell) or is_solution(cell) or "needs-solution" in cell.metadata.get("tags", [])
    return cell.cell_type == "code" and mine


# --- regions ------------------------------------------------------------------------------------------------------


def split(source: str, what: str) -> list[tuple[bool, str]]:
    """(inside, line) for every line; markers `### BEGIN <what>` and `### END <what>` are inside. They do not nest."""
    found, open_region = [], False
    for line in source.split("\n"):
        begins, ends = (line.strip() == f"### {word} {what}" for word in ("BEGIN", "END"))
        if (begins and open_region) or (ends and not open_region):
            raise ValueError(f"'{line.strip()}' where it cannot be")
        if not (begins or ends) and (f"BEGIN {what}" in line or f"END {what}" in line):
            raise ValueError(f"'{line.strip()}' is no marker: ### BEGIN {what} or ### END {what} is, alone on a line")
        found.append((open_region or begins, line))
        open_region = begins or (open_region and not ends)
    if open_region:
        raise ValueError(f"no ### END {what}")
    return found


def inside(source: str, what: str) -> list[str]:
    """The lines between the markers, without them."""
    markers = (f"### BEGIN {what}", f"### END {what}")
    return [line for within, line in split(source, what) if within and line.strip() not in markers]


def replace(source: str, what: str, stub: str = "") -> str:
    """Each region becomes `stub` at the indentation of its first marker; without a stub it goes."""
    out = []
    for within, line in split(source, what):
        if not within:
            out.append(line)
        elif stub and line.strip() == f"### BEGIN {what}":
            indent = line[: len(line) - len(line.lstrip())]
            out += [indent + row for row in stub.split("\n")]
    return "\n".join(out)


# --- validation ---------------------------------------------------------------------------------------------------


def problems(cells: list[Any]) -> list[str]:
    """One line for each way in which the cells are not nbgrader's schema 3, or cannot be graded as they stand."""
    found, seen = [], set()
    for number, cell in enumerate(cells):
        meta = cell.metadata.get("nbgrader")
        place = f"cell {number}" + (f" ({meta['grade_id']})" if meta and "grade_id" in meta else "")
        found += [f"{place}: {line}" for line in wrong_markers(cell)]
        if meta is None:
            continue
        wrong = wrong_keys(meta)
        found += [f"{place}: {line}" for line in wrong]
        if wrong:
            continue
        if meta["grade_id"] in seen:
            found.append(f"{place}: the grade_id is used twice")
        seen.add(meta["grade_id"])
        found += [f"{place}: {line}" for line in wrong_role(cell, meta)]
    return found


def wrong_keys(meta: Any) -> list[str]:
    wanted = set(TYPES) - ({"points"} if not meta.get("grade") else set())
    found = [f"no '{key}'" for key in sorted(wanted - set(meta))]
    found += [f"'{key}' does not belong here" for key in sorted(set(meta) - wanted)]
    for key in sorted(wanted & set(meta)):
        value, kind = meta[key], TYPES[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found.append(f"'{key}' is {value!r}")
    if not found and not re.fullmatch(r"[\w-]+", meta["grade_id"], re.ASCII):
        found.append("a grade_id is letters, digits, - and _")
    if meta.get("schema_version") != 3:
        found.append(f"schema_version has to be 3, not {meta.get('schema_version')}")
    return found


def wrong_role(cell: Any, meta: Any) -> list[str]:
    """A cell is an answer, a check, a written answer that a person grades (both), or locked."""
    grade, solution = meta["grade"], meta["solution"]
    rules = {
        "the cell_type is another": meta["cell_type"] != cell.cell_type,
        "a graded cell is worth more than 0 points": grade and meta["points"] <= 0,
        "a check is code; a written answer needs solution: true": grade and not solution and cell.cell_type != "code",
        "a written answer needs grade: true and points": solution and not grade and cell.cell_type != "code",
        "a check has to be locked": grade and not solution and not meta["locked"],
        "a student cannot write into a locked cell": solution and meta["locked"],
        "neither grade, solution nor locked: leave the metadata out": not (grade or solution or meta["locked"]),
        "tasks are not used here": meta["task"],
        "a solution cell needs a solution region": solution and "### BEGIN SOLUTION" not in cell.source,
    }
    return [line for line, broken in rules.items() if broken]


def wrong_markers(cell: Any) -> list[str]:
    found = []
    for what, allowed in (("SOLUTION", is_solution(cell)), ("HIDDEN TESTS", graded(cell) and not is_solution(cell))):
        try:
            marked = any(within for within, _ in split(cell.source, what))
        except ValueError as error:
            found.append(str(error))
        else:
            if marked and not allowed:
                found.append(f"a region {what} in a cell that is not marked for it")
    return found


# --- the two versions ---------------------------------------------------------------------------------------------


def with_defaults(cell: Any) -> Any:
    """The cell's metadata with nbgrader's defaults filled in; a check is locked unless it says otherwise."""
    metadata = dict(cell.metadata)
    if "nbgrader" in metadata:
        given = metadata["nbgrader"]
        locked = bool(given.get("grade") and not given.get("solution"))
        metadata["nbgrader"] = DEFAULTS | {"locked": locked, "cell_type": cell.cell_type} | given
    return metadata


def solution(path: Path) -> Any:
    """The problem set as a notebook with everything in it, the set-up cell first."""
    setup = nbformat.v4.new_code_cell(SETUP.replace("INSTALL", project.install_line()).rstrip())
    setup.metadata = {"tags": ["setup"], "nbgrader": {"grade_id": "setup", "locked": True}}
    cells = []
    for cell in [setup, *read_chapter(path).cells]:
        plain_markdown(cell, path.stem)
        new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        made = new(cell.source, metadata=with_defaults(cell))
        digest = hashlib.sha256(f"{path.stem}\0{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
        made["id"] = made.metadata.get("nbgrader", {}).get("grade_id") or digest
        cells.append(made)
    if wrong := problems(cells):
        raise AssignmentError(f"{path.stem}: {wrong[0]}")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def plain_markdown(cell: Any, name: str) -> None:
    """A downloaded notebook has no book around it: directives, roles and links to chapters have no place in it."""
    if cell.cell_type != "markdown":
        return
    for block in blocks(cell.source):
        role = None if block.verbatim else next((m["role"] for m in ROLE.finditer(block.body) if m["role"]), None)
        if block.name or role:
            raise MarkupError(f"{name}: '{block.name or role}' in a problem set; its text is plain Markdown")


def release(nb: Any) -> Any:
    """The student version: stubs for solutions, no hidden tests, checks that cannot be edited; what nbgrader makes."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        cell.source = replace(cell.source, "SOLUTION", CODE_STUB if cell.cell_type == "code" else TEXT_STUB)
        cell.source = replace(cell.source, "HIDDEN TESTS")
        meta = cell.metadata.get("nbgrader", {})
        if meta:
            cell.metadata["deletable"] = False
        if meta.get("locked"):
            cell.metadata["editable"] = False
    return nb


def versions(path: Path) -> dict[str, Any]:
    """The notebooks of a problem set, by folder."""
    whole = solution(path)
    return {"release": release(whole), "solution": whole}


def drift(folder: Path = FOLDER) -> list[str]:
    """One line for each stored notebook that is not what its source says. Nothing is written."""
    found = []
    for name in names(folder):
        for version, nb in versions(folder / f"{name}.md").items():
            path = folder / version / f"{name}.ipynb"
            if not path.exists():
                found.append(f"{version}/{name}.ipynb: missing")
            elif content(nbformat.read(path, as_version=4)) != content(nb):
                found.append(f"{version}/{name}.ipynb: differs from {name}.md")
    for version in VERSIONS:
        extra = {p.stem for p in (folder / version).glob("*.ipynb")} - set(names(folder))
        found += [f"{version}/{name}.ipynb: no problem set of this name" for name in sorted(extra)]
    return found


def content(nb: Any) -> list[Any]:
    """What has to agree between a stored notebook and its source: everything."""
    return [(c.id, c.cell_type, c.source, dict(c.metadata), c.get("outputs", [])) for c in nb.cells]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="problem sets without .md (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is not up to date")
    args = parser.parse_args(arguments)

    unknown = [name for name in args.sets if name not in names()]
    if unknown:
        print(f"no problem set '{unknown[0]}'; problem sets: {', '.join(names())}", file=sys.stderr)
        return 2
    try:
        if args.check:
            lines = drift()
            print("\n".join(lines) or "problem sets agree with their sources")
            return int(bool(lines))
        for name in args.sets or names():
            for version, nb in versions(FOLDER / f"{name}.md").items():
                path = FOLDER / version / f"{name}.ipynb"
                path.parent.mkdir(exist_ok=True)
                nbformat.validate(nb)
                nbformat.write(nb, path)
                points = sum(c.metadata["nbgrader"]["points"] for c in nb.cells if graded(c))
                print(f"{path.relative_to(project.ROOT)}: {len(nb.cells)} cells, {points} points")
    except (AssignmentError, MarkupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
