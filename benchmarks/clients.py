"""How much faster are K clients in one grouped pass than one after the other?"""

import copy
from collections.abc import Sequence

import torch
from timing import Row, compare, main

from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.data.base import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import METHODS, Budget, Server, federate
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.privacy import DPSGD
from fedlora_mini.state import stack

ROWS = ("fedit", "fedsa", "iat")


def gradients() -> list[Row]:
    """One step's gradients, without the optimiser."""
    rows = []
    for K in (4, 8, 16):
        for b in (1, 4) if K == 16 else (1, 4, 16):
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
            rows += compare(f"minisam, 48 px, K={K}, {b} a client", "one after the other", arms, rounds=3)
    return rows


def rounds(names: Sequence[str], sizes: Sequence[tuple[int, int]], guard: Guarding | None = None) -> list[Row]:
    """Whole rounds of two local steps: news, training, updates, aggregation. guard: private ones, of all images."""
    rows = []
    for name in names:
        for K, b in sizes:
            model = prepare(zoo.build("minisam", classes=2), "lora", rank=4)
            start, budget, row = trainable(model), Budget(steps=2, batch=b), METHODS[name]
            x = torch.rand(K, 2 * b, 3, 48, 48)
            splits = [Split(images, (images.mean(1) > 0.5).to(torch.uint8)) for images in x]

            def one(execution: str, model=model, start=start, budget=budget, row=row, splits=splits) -> None:
                engine = LocalEngine(
                    model, row, keys(model, list(start)), splits, budget, execution=execution, guard=guard
                )
                list(federate(row, engine, Server(start), engine.keys, 1, budget.steps, lambda round: engine.clients))

            arms = {
                "one after the other": lambda one=one: one("sequential"),
                "grouped": lambda one=one: one("grouped"),
            }
            what = f"{name}, private" if guard else name
            rows += compare(f"{what}: a round, K={K}, {b} a client", "one after the other", arms, rounds=3)
    return rows


def measure() -> list[Row]:
    """How much faster are K clients in one grouped pass than one after the other?"""
    plain = rounds(ROWS, ((4, 1), (8, 1), (16, 1), (4, 4), (8, 4), (16, 4)))
    private = rounds(("fedit", "la_lora"), ((4, 4), (8, 4), (4, 16), (8, 16)), Guarding(DPSGD(sigma=1.0, q=0.5)))
    return gradients() + plain + private


if __name__ == "__main__":
    main(measure)
