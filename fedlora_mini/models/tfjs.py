"""A reader of TensorFlow.js' layers format: `model.json` lists the arrays, binary shards hold their bytes end to end.

    {"format": "layers-model",
     "modelTopology": {"model_config": {"config": {"layers": [{"class_name": …, "config": {…}}, …]}}},
     "weightsManifest": [{"paths": [shard, …], "weights": [{"name": …, "shape": […], "dtype": …}, …]}, …]}

The bytes of a group are its shards one after the other; its arrays lie in them in the listed order, little-endian, last
axis fastest, nothing between. A convolution's kernel is (*k, c_in / groups, c_out). Nothing in a file is ever executed.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_mini.errors import FedloraError, unknown

DTYPES = {"float32": "<f4", "int32": "<i4", "uint8": "|u1", "bool": "|b1"}
Layer = dict[str, Any]  # {"class_name": …, "config": {…}}


def read_layers_model(path: Path) -> tuple[list[Layer], dict[str, np.ndarray]]:
    """(layers, {name: array}) of a `model.json`, both in the file's order.

    Raises for a missing shard, one that does not lie beside `model.json`, bytes too many or too few, an unknown dtype,
    quantised weights, and names that occur twice.
    """
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
        layers = list(model["modelTopology"]["model_config"]["config"]["layers"])
        groups = [(list(group["paths"]), list(group["weights"])) for group in model["weightsManifest"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedloraError(f"cannot read '{path}' as a TensorFlow.js layers model: {error!r}") from None
    arrays: dict[str, np.ndarray] = {}
    for shards, weights in groups:
        found = _split(b"".join(_shard(path, name) for name in shards), weights, path)
        if twice := arrays.keys() & found.keys():
            raise FedloraError(f"'{path}' lists '{min(twice)}' twice")
        arrays |= found
    return layers, arrays


def _shard(path: Path, name: str) -> bytes:
    if name != Path(name).name:
        raise FedloraError(f"'{path}' names the shard '{name}', which is not a file beside it")
    try:
        return (path.parent / name).read_bytes()
    except OSError:
        raise FedloraError(f"the shard '{name}' of '{path}' is missing or cannot be read") from None


def _split(data: bytes, weights: list[dict[str, Any]], path: Path) -> dict[str, np.ndarray]:
    """The arrays of one group from its bytes."""
    arrays, start = {}, 0
    for entry in weights:
        name, shape, dtype = entry.get("name"), entry.get("shape"), entry.get("dtype")
        if dtype not in DTYPES:
            raise unknown(f"dtype of '{name}' in '{path}':", dtype, DTYPES)
        if "quantization" in entry:
            raise FedloraError(f"'{name}' in '{path}' is quantised; only plain weights are read")
        if not isinstance(shape, list) or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise FedloraError(f"'{name}' in '{path}' has the shape {shape}; a list of sizes is needed")
        if name in arrays:
            raise FedloraError(f"'{path}' lists '{name}' twice")
        kind = np.dtype(DTYPES[dtype])
        end = start + math.prod(shape) * kind.itemsize
        if end > len(data):
            raise FedloraError(f"the shards of '{path}' end inside '{name}': {len(data):,} bytes, {end:,} are needed")
        arrays[str(name)] = np.frombuffer(data[start:end], kind).reshape(shape)
        start = end
    if start < len(data):
        raise FedloraError(f"the shards of '{path}' hold {len(data):,} bytes, its arrays take {start:,}")
    return arrays
