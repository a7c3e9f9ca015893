"""Does a merged adapter cost anything at inference?"""

import torch
from timing import Row, compare, main
from torch import nn

from fedlora_mini.adapters import adapters, merge, prepare, unload
from fedlora_mini.models import zoo


def lora(name: str) -> nn.Module:
    model = prepare(zoo.build(name, classes=2), "lora")
    for _, adapter in adapters(model):
        nn.init.normal_(getattr(adapter, adapter.factors[-1]), std=0.01)
    return model.eval()


def measure() -> list[Row]:
    """Does a merged adapter cost anything at inference?"""
    rows = []
    for name, size in (("minisam", 48), ("swin_unetr", 64)):
        x = torch.rand(8, 3, size, size)
        models = {
            "base": zoo.build(name, classes=2).eval(),
            "merged": merge(lora(name)),
            "unloaded": unload(lora(name)),
            "not merged": lora(name),
        }
        for model in models.values():
            model.requires_grad_(False)
        arms = {arm: (lambda model=model, x=x: model(x)) for arm, model in models.items()}
        rows += compare(f"{name}, {size} px, batch 8", "base", arms)
    return rows


if __name__ == "__main__":
    main(measure)
