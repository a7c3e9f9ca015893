"""What does SOR add to a local training step?"""

from itertools import product

import torch
from timing import Row, compare, main

from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.models import zoo
from fedlora_mini.regularizers import SOR, Context

NETWORKS = {"minisam": 48, "unet": 64}
FORMS = {"iat": ("lora", ("proxy", "exact", "subspace")), "dual": ("dual", ("dual",))}  # method: adapter, forms
STEPS = 10  # in one act


def measure() -> list[Row]:
    """What does SOR add to a local training step?"""
    rows, rng = [], torch.Generator().manual_seed(0)
    for (network, side), (name, (adapter, forms)) in product(NETWORKS.items(), FORMS.items()):
        model = prepare(zoo.build(network, classes=2), adapter, rank=4)
        start = {n: v + 0.02 * torch.randn(v.shape, generator=rng) for n, v in trainable(model).items()}
        state = {n: v + 0.01 * torch.randn(v.shape, generator=rng) for n, v in start.items()}
        held, table = {n: v.requires_grad_() for n, v in state.items()}, keys(model, list(start))
        x = torch.rand(8, 3, side, side, generator=rng)
        y = (x.mean(1) > 0.5).to(torch.uint8)

        def steps(model=model, name=name, table=table, start=start, x=x, y=y) -> None:
            train(model, METHODS[name], table, [start], lambda step: (x, y), Budget(steps=STEPS), round=2)

        arms = {"local steps": steps}
        for form in forms:
            term, context = SOR(form=form), Context(2, 1, start, table, 0.1)

            def alone(term=term, context=context, held=held) -> None:
                for _ in range(STEPS):
                    term.penalty(held, context).backward()
                    with torch.no_grad():
                        term.prox_(held, context)

            arms[f"{form} alone"] = alone
        rows += compare(f"{METHODS[name].title}, {network}, {side} px, batch 8", "local steps", arms, rounds=7)
    return [row | {"ms": round(row["ms"] / STEPS, 3)} for row in rows]


if __name__ == "__main__":
    main(measure)
