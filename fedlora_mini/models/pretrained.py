"""Frozen bases: networks with pre-trained weights, from a safetensors file or by name; each task has a new head."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from fedlora_mini.adapters.base import region
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import efficientnet, meshnet
from fedlora_mini.models.zoo import build, check_size
from fedlora_mini.state import State

BUILT_IN = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class Base:
    """Weights that others have trained: their network, and a reader that says what to run if they are missing."""

    model: str
    read: Callable[[], tuple[State, dict[str, Any]]]  # (tensors, notes)


BASES: dict[str, Base] = {
    "meshnet-brain": Base("meshnet", meshnet.read_weights),  # all of it: white and grey matter from T1 volumes
    "imagenet": Base("efficientnet", efficientnet.read_weights),  # the encoder
}


def save_base(model: nn.Module, out: Path, metadata: dict[str, Any]) -> Path:
    """Write the weights and their metadata to one safetensors file, under a temporary name first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One key: the format does not promise an order of several, and the same weights should be the same bytes.
    part.write_bytes(
        save(tensors, {"notes": json.dumps(metadata, sort_keys=True)})
    )  # save_file's are the owner's alone
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


def _read(name: str, base: str) -> tuple[State, dict[str, Any]]:
    """The weights that `base` stands for, if they are for network `name`."""
    if base in BASES:
        if BASES[base].model != name:
            raise FedloraError(f"base '{base}' is for model '{BASES[base].model}', not for '{name}'")
        return BASES[base].read()
    if not Path(base).is_file():
        accepted = ", ".join(["auto", "none", *BASES])
        raise FedloraError(f"cannot read base weights '{base}': no such file; accepted: {accepted}, or a file")
    return read_base(Path(base))


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
    a name of `BASES`; or the path of a file that `fedlora pretrain` wrote. What the base does not hold is random from
    `seed`, and so is the head, unless `same_task`: then the base's head is kept too (its number of classes must fit).
    """
    check_size(name, spatial)
    options: dict[str, Any] = {"img_size": spatial} if name.startswith("unetr") else {}
    model = build(name, classes, seed=seed, **options)
    shipped = BUILT_IN / f"{name}.safetensors"
    if base == "none" or (base == "auto" and not shipped.exists()):
        return model
    base = str(shipped) if base == "auto" else base
    tensors, _ = _read(name, base)
    own = model.state_dict()
    if foreign := [tensor_name for tensor_name in tensors if tensor_name not in own]:
        raise FedloraError(
            f"'{base}' does not fit model '{name}', which has no '{foreign[0]}'; accepted: weights of this network, "
            "such as a file of `fedlora pretrain`"
        )
    heads = {n for n in tensors if region(model, n.rpartition(".")[0]) == "head"}
    if same_task and not heads:
        raise FedloraError(f"'{base}' holds no head for model '{name}': same_task cannot keep it")
    for tensor_name, value in tensors.items():
        if tensor_name in heads and not same_task:
            continue
        if own[tensor_name].shape != value.shape:
            raise FedloraError(f"'{base}' does not fit model '{name}': '{tensor_name}' {tuple(value.shape)}")
        own[tensor_name].copy_(value)
    return model
