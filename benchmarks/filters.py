"""What does a filter of private gradients add to the private step that made them?"""

import torch
from timing import Row, compare, main

from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.privacy import DPSGD, Doppler, Laplacian, LowPass, Seeded
from fedlora_mini.regularizers import Context

TERMS = {"low-pass alone": LowPass(), "Laplacian alone": Laplacian(), "DOPPLER alone": Doppler()}


def measure() -> list[Row]:
    """What does a filter of private gradients add to the private step that made them?"""
    rows = []
    for name, size in (("minisam", 48), ("unet", 64), ("swin_unetr", 64)):
        model = prepare(zoo.build(name, classes=2), "lora", rank=4)
        state, source = trainable(model), Seeded(torch.Generator().manual_seed(0))
        context = Context(1, 1, {}, keys(model, list(state)), 0.1, memory={})
        x = torch.rand(8, 3, size, size)
        y = (x.mean(1) > 0.5).to(torch.uint8)

        def step(model=model, state=state, x=x, y=y, source=source) -> dict[str, torch.Tensor]:
            return DPSGD(1.0, 0.1).gradient(model, state, segmentation_loss, x, y, 80, source)

        gradient = step()
        arms = {"private step": step}
        for label, term in TERMS.items():
            arms[label] = lambda term=term, g=gradient, s=state, c=context: term.gradient_(dict(g), s, c)
        rows += compare(f"{name}, {size} px, batch 8, every layer", "private step", arms, rounds=9)
    return rows


if __name__ == "__main__":
    main(measure)
