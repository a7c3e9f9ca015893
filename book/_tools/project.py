"""What the book's tools have to know about the project, in one place: address, source hash, environment of a kernel."""

import hashlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
NOTEBOOKS = BOOK / "notebooks"
BUILD = ROOT / "build"


def settings(root: Path = ROOT) -> dict[str, str]:
    """The table `[tool.fedlora]` of pyproject.toml: `repository_url` and `repository_branch`."""
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fedlora"]
    return {"repository_url": table["repository_url"].rstrip("/"), "repository_branch": table["repository_branch"]}


def install_line(root: Path = ROOT) -> str:
    """The argument of `pip install` that fetches the package from its public address."""
    s = settings(root)
    return f"git+{s['repository_url']}@{s['repository_branch']}"


def sources(root: Path = ROOT) -> Iterator[Path]:
    """Every file that can change a chapter's output without changing the chapter: the package and stored results."""
    for path in sorted((root / "fedlora_mini").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path
    for path in sorted((root / "results").rglob("*.json*")):
        if path.is_file():
            yield path


def source_hash(root: Path = ROOT) -> str:
    """12 hex digits over the names and contents of `sources`: part of the execution cache's path."""
    h = hashlib.sha256()
    for path in sources(root):
        h.update(path.relative_to(root).as_posix().encode() + b"\0")
        h.update(hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()[:12]


def cache_path(root: Path = ROOT) -> Path:
    """Where executed chapters are kept. jupyter-cache keys on a chapter's code only, so the path carries the rest."""
    return root / "build" / ".jupyter_cache" / source_hash(root)


def kernel_environment(threads: int = 1) -> dict[str, str]:
    """Variables that a chapter's kernel inherits: a fixed number of threads, the package importable from the checkout.

    A number of threads that the caller's environment already states wins.
    """
    variables = {name: os.environ.get(name, str(threads)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    old = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT)]
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *old])
    variables["PYTHONHASHSEED"] = "0"
    return variables
