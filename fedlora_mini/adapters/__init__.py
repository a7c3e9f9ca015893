"""What is trained in a layer."""

from fedlora_mini.adapters.base import (
    Adapter,
    Key,
    adapters,
    call,
    freeze,
    inject,
    keys,
    load_state,
    merge,
    region,
    trainable,
    unload,
    unmerge,
)
from fedlora_mini.adapters.dense import Dense
from fedlora_mini.adapters.diagonal import Diagonal, prune
from fedlora_mini.adapters.dora import DoRA, EDoRA
from fedlora_mini.adapters.grouped import expand, per_sample_gradients
from fedlora_mini.adapters.io import load, save
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.registry import ADAPTERS, prepare
from fedlora_mini.adapters.select import select_directions

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Dense",
    "Diagonal",
    "DoRA",
    "EDoRA",
    "Key",
    "LoRA",
    "adapters",
    "call",
    "expand",
    "freeze",
    "inject",
    "keys",
    "load",
    "load_state",
    "merge",
    "per_sample_gradients",
    "prepare",
    "prune",
    "region",
    "save",
    "select_directions",
    "trainable",
    "unload",
    "unmerge",
]
