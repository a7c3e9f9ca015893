"""Where a number came from: code, libraries, machine."""

import hashlib
import inspect
import os
import platform
from collections.abc import Mapping, Set
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from fedlora_mini import __version__
from fedlora_mini import state as S
from fedlora_mini.data import Dataset
from fedlora_mini.experiments.config import RunConfig

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


def origin(config: RunConfig, data: Dataset) -> dict[str, str]:
    """`versions`, and digests of what a config only names: a base, a row, which its user may have written, the images.

    Under privacy no images: who guesses them could confirm the guess by it.
    """
    row = hashlib.sha256(text_of(config.row).encode()).hexdigest()[:12]
    return versions() | weights(config.base) | {"row": row} | ({} if config.private else {"data": data.digest})


def changed(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What of a run's inputs is not what it was, in words, by their `versions`; "" where nothing is known to differ.

    A row's text is compared under one state of the package's code alone.
    """
    told = {"base": "other weights in the base's file", "row": "another row of that name", "data": "other images"}
    if old.get("source") != new.get("source"):
        del told["row"]
    return next((what for name, what in told.items() if name in old and name in new and old[name] != new[name]), "")


def text_of(part: Any, above: tuple[int, ...] = ()) -> str:
    """A text that differs where parts of a row do, and is the same in every process.

    With the source of what is not the package's own. above: what holds this part, to which it is not followed back.
    """
    if id(part) in above:
        return "itself"
    within = partial(text_of, above=(*above, id(part)))
    if isinstance(part, Tensor):
        return S.digest({"": part})
    if isinstance(part, Set):
        return f"{{{', '.join(sorted(map(within, part)))}}}"
    if isinstance(part, Mapping | tuple | list):
        return f"({', '.join(map(within, part.items() if isinstance(part, Mapping) else part))})"
    if isinstance(part, MethodType):
        return within((part.__func__, part.__self__))
    if isinstance(part, partial):
        return within((part.func, part.args, part.keywords))
    kind = part if isinstance(part, type | FunctionType) else type(part)
    if kind.__module__ == "builtins":
        return repr(part)
    try:
        own = "" if kind.__module__.startswith("fedlora_mini.") else inspect.getsource(kind)
    except (OSError, TypeError):
        own = ""  # written in a console that keeps no source
    if isinstance(part, FunctionType):
        held: Any = ([cell.cell_contents for cell in part.__closure__ or ()], part.__defaults__, part.__kwdefaults__)
    else:
        held = {} if isinstance(part, type) else getattr(part, "__dict__", {})
    return f"{kind.__module__}.{kind.__qualname__}{within(held)}{own}"


def machine(device: torch.device) -> dict[str, Any]:
    """The device by name, threads and cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count() or 1}
