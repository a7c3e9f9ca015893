"""W_0 <- W_0 + s B A in a federation: what the server folds into frozen weights, everyone folds in likewise."""

from collections.abc import Mapping
from typing import Any

import torch

from fedlora_mini.adapters.base import Adapter
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.adapters.ops import to_weight
from fedlora_mini.federation.sampling import generator
from fedlora_mini.state import State


def products_in(state: State) -> State:
    """The thin products among a rule's results or a server's news."""
    return {name: value for name, value in state.items() if name.endswith((".fold.A", ".fold.B"))}


@torch.no_grad()
def fold(state: State, products: State, layers: Mapping[str, Adapter]) -> State:
    """The new frozen weights, `<path>.base.weight`, from those in `state` or, where it has none, the network's own."""
    out: State = {}
    for name in products:
        path, _, factor = name.rpartition(".fold.")
        if factor == "A":
            layer: Any = layers[path]
            W = state.get(f"{path}.base.weight", layer.frozen())
            change = to_weight(layer.base, products[f"{path}.fold.B"] @ products[name])
            out[f"{path}.base.weight"] = W + layer.scaling * change
    return out


def fresh(state: State, round: int, layers: Mapping[str, Adapter], seed: int = 0) -> State:
    """LoRA's start anew: A random, the same for everyone in this round, B zero; ranks as in `state`."""
    out: State = {}
    for path in layers:
        A, B = state.get(f"{path}.A"), state.get(f"{path}.B")
        if A is not None and B is not None:
            rank: Any = layers[path].rank
            start = kaiming_uniform((rank, A.shape[-1]), generator(seed, round, path)).to(A)
            out |= {f"{path}.A": start[: len(A)].clone(), f"{path}.B": torch.zeros_like(B)}
    return out
