"""Prepared data: npz without pickle, masks bit-packed, written to a temporary name and renamed."""

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_mini.errors import FedloraError


def save_npz(path: Path, **arrays: Any) -> Path:
    """Atomic: another process sees the old file, the new file or none. Raises where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError as error:
        raise FedloraError(f"cannot write {path} ({error.strerror}); FEDLORA_HOME names the folder to use") from None
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FedloraError(f"{path} is damaged ({error}); delete it and prepare it again") from error


def pack(masks: np.ndarray) -> np.ndarray:
    """bool (N, H, W) -> uint8 (N, ceil(H W / 8))."""
    return np.packbits(masks.reshape(len(masks), -1), axis=1)


def unpack(bits: np.ndarray, height: int, width: int) -> np.ndarray:
    """The inverse of `pack`, as uint8 0/1."""
    return np.unpackbits(bits, axis=1, count=height * width).reshape(-1, height, width)
