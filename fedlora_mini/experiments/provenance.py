"""Where a number came from: code, libraries, machine."""

import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedlora_mini import __version__

PACKAGE = Path(__file__).parent.parent


@cache
def source_digest() -> str:
    """Twelve digits of the sha256 over the package's own sources: two runs with the same one ran the same code."""
    sha = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sha.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def versions() -> dict[str, str]:
    """The package, Python and the libraries that can change a number."""
    out = {"fedlora_mini": __version__, "source": source_digest(), "python": platform.python_version()}
    for name in ("torch", "monai", "numpy", "scipy"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "absent"
    return out


def weights(base: str) -> dict[str, str]:
    """Twelve digits of the sha256 of a base's file, where the base is one: a path alone does not say which weights."""
    return {"base": hashlib.sha256(Path(base).read_bytes()).hexdigest()[:12]} if Path(base).is_file() else {}


def machine(device: torch.device) -> dict[str, Any]:
    """The device by name, threads and cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count() or 1}
