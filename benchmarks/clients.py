"""How much faster are K clients in one grouped pass than one after the other?"""

import copy

import torch
from timing import Row, compare, main

from fedlora_mini.adapters import call, prepare, trainable
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.state import stack


def measure() -> list[Row]:
    """How much faster are K clients in one grouped pass than one after the other?"""
    rows = []
    for K in (4, 8):
        for b in (1, 4, 16):
            model = prepare(zoo.build("minisam", classes=2), "lora", rank=4)
            models = [copy.deepcopy(model) for _ in range(K)]
            x = torch.rand(K * b, 3, 48, 48)
            y = (x.mean(1) > 0.5).to(torch.uint8)
            stacked = {n: v.requires_grad_() for n, v in stack([trainable(m) for m in models]).items()}

            def loop(models=models, x=x, y=y, b=b) -> None:
                for k, own in enumerate(models):
                    part = slice(k * b, (k + 1) * b)
                    value = segmentation_loss(own(x[part]), y[part]).mean()
                    torch.autograd.grad(value, [p for p in own.parameters() if p.requires_grad])

            def grouped(model=model, stacked=stacked, x=x, y=y, b=b) -> None:
                value = segmentation_loss(call(model, stacked, x), y).sum() / b
                torch.autograd.grad(value, list(stacked.values()))

            arms = {"one after the other": loop, "grouped": grouped}
            rows += compare(f"minisam, 48 px, K={K}, {b} a client", "one after the other", arms, rounds=9)
    return rows


if __name__ == "__main__":
    main(measure)
