"""Frozen bases: networks with pre-trained weights, read from safetensors; the head is new for every task."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fedlora_mini.adapters.base import region
from fedlora_mini.errors import FedloraError
from fedlora_mini.models.zoo import build, check_size

BUILT_IN = Path(__file__).parent / "pretrained"


def save_base(model: nn.Module, out: Path, metadata: dict[str, Any]) -> Path:
    """Write the weights and their metadata to one safetensors file, under a temporary name first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One key: the format does not promise an order of several, and the same weights should be the same bytes.
    save_file(tensors, part, metadata={"notes": json.dumps(metadata, sort_keys=True)})
    os.replace(part, out)
    return out


def read_base(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file that `save_base` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("notes", "{}"))
    except Exception as error:
        raise FedloraError(f"cannot read base weights '{path}': {error}") from None


def load_base(
    name: str = "minisam",
    classes: int = 2,
    spatial: tuple[int, ...] = (64, 64),
    base: str = "auto",
    seed: int = 0,
    same_task: bool = False,
) -> nn.Module:
    """A network for `classes` classes on a pre-trained base.

    base: "auto" = the weights in the package if there are any for this network, else random ones; "none" = random;
    or the path of a file that `fedlora pretrain` wrote. The head is random from `seed`, unless `same_task`: then the
    file's head is kept too (its number of classes must fit).
    """
    check_size(name, spatial)
    options: dict[str, Any] = {"img_size": spatial} if name.startswith("unetr") else {}
    model = build(name, classes, seed=seed, **options)
    shipped = BUILT_IN / f"{name}.safetensors"
    path = shipped if base == "auto" else Path(base)
    if base == "none" or (base == "auto" and not shipped.exists()):
        return model
    tensors, _ = read_base(path)
    own = model.state_dict()
    for tensor_name, value in tensors.items():
        if not same_task and region(model, tensor_name.rpartition(".")[0]) == "head":
            continue
        if tensor_name not in own or own[tensor_name].shape != value.shape:
            raise FedloraError(f"'{path}' does not fit model '{name}': '{tensor_name}' {tuple(value.shape)}")
        own[tensor_name].copy_(value)
    return model
