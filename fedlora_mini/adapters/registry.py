"""The table of what can be trained: one row a recipe. A contract test runs on every row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedlora_mini.adapters.base import Adapter, freeze, inject, region
from fedlora_mini.adapters.dense import Dense
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import LAYERS
from fedlora_mini.errors import FedloraError, unknown


@dataclass(frozen=True)
class Recipe:
    """What is trained in a model. `wrap` = an adapter on every encoder and decoder layer, the head by `Dense`."""

    summary: str
    reference: str
    lr: float = 5e-3  # Adam's rate to start a search from
    wrap: type[Adapter] | None = None
    own: Callable[[str], bool] | None = None  # region -> whether the model's own parameters train there

    @property
    def grouped(self) -> bool:
        """Whether everything it trains can carry a group axis: adapters can, a model's own parameters cannot."""
        return self.own is None


ADAPTERS: dict[str, Recipe] = {
    "lora": Recipe("ΔW = s B A in encoder and decoder; head trained in full", "hu2022lora", wrap=LoRA),
    "head": Recipe("the head alone (linear probe)", "", wrap=None),
    "full": Recipe("every parameter, norm statistics included", "", lr=1e-3, own=lambda region: True),
}


def prepare(model: nn.Module, name: str = "lora", seed: int = 0, **options: Any) -> nn.Module:
    """Make `model` trainable as row `name` says, in place; everything else is frozen. Options go to the adapter.

    After it, `trainable(model)` is the state that a federation moves.
    """
    if name not in ADAPTERS:
        raise unknown("adapter", name, ADAPTERS)
    recipe = ADAPTERS[name]
    freeze(model)
    model.recipe = name  # type: ignore[assignment]  # what `save` writes down
    if recipe.own is not None:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(recipe.own(region(model, path)))
        return model.train()
    if recipe.wrap is not None:
        wrap = recipe.wrap

        def make(layer: nn.Module, generator: torch.Generator) -> Adapter:
            return wrap(layer, generator=generator, **options)  # type: ignore[call-arg]

        inject(model, make, lambda path, module: region(model, path) != "head", seed)
    heads = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LAYERS) and not path.endswith(".base") and region(model, path) == "head"
    ]
    if not heads:
        raise FedloraError(f"{type(model).__name__} has no layer in the region 'head'")
    inject(model, lambda layer, generator: Dense(layer), lambda path, module: path in heads, seed)
    return model
