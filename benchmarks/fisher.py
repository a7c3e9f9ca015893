"""What does the diagonal Fisher cost, image by image?"""

import torch
from timing import Row, compare, main

from fedlora_mini.adapters import prepare, trainable
from fedlora_mini.adapters.base import call
from fedlora_mini.adapters.features import in_use
from fedlora_mini.data.base import Split
from fedlora_mini.federation.fisher import diagonal_fisher, log_loss, mapped_gradients
from fedlora_mini.models import zoo

SETTINGS = (("minisam", 32), ("minisam", 64), ("unet", 64))
BATCH = 8


def measure() -> list[Row]:
    """What does the diagonal Fisher cost, image by image?"""
    rows, rng = [], torch.Generator().manual_seed(0)
    for network, side in SETTINGS:
        x = torch.rand(BATCH, 3, side, side, generator=rng)
        data = Split(x, (x.mean(1) > 0.5).to(torch.uint8))
        for adapter in ("lora", "full"):
            model = prepare(zoo.build(network, classes=2), adapter)
            start = {name: value for name, value in trainable(model).items() if value.is_floating_point()}
            state = {name: value + 0.02 * torch.randn(value.shape, generator=rng) for name, value in start.items()}

            def batched(model=model, state=state, data=data) -> None:
                """The square of a batch's mean gradient: no Fisher information, but one plain pass."""
                leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
                loss = log_loss(call(model, leaves, data.images), data.masks).mean()
                torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

            def one_by_one(model=model, state=state, data=data) -> None:
                total = {name: torch.zeros_like(value) for name, value in state.items()}
                with in_use(model):
                    for x, y in zip(data.images.split(1), data.masks.split(1), strict=True):
                        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
                        loss = log_loss(call(model, leaves, x), y).sum()
                        found = torch.autograd.grad(loss, list(leaves.values()))
                        for name, g in zip(leaves, found, strict=True):
                            total[name] += g.square()

            def mapped(model=model, state=state, data=data) -> None:
                with in_use(model):
                    found = mapped_gradients(model, state, data.images, data.masks)
                _ = {name: g.square().sum(0) for name, g in found.items()}

            def ours(model=model, state=state, data=data) -> None:
                diagonal_fisher(model, state, data, batch=BATCH)

            arms = {"one image at a time": one_by_one, "a gradient mapped over images": mapped}
            arms |= {"ours": ours, "the batch's mean, squared": batched}
            what = "rank 4" if adapter == "lora" else "all weights"
            rows += compare(f"{network}, {side} px, batch {BATCH}, {what}", "one image at a time", arms, 7, memory=True)
    return rows


if __name__ == "__main__":
    main(measure)
