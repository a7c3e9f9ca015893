"""Is a LoRA training step as fast as peft's on the same transformer blocks?"""

import torch
from timing import Row, compare, main
from torch import nn

from fedlora_mini.adapters import LoRA, inject
from fedlora_mini.models.minisam import Block

SETTINGS = [  # width, depth, heads, mlp ratio, tokens
    (64, 4, 4, 2, 144),  # MiniSAM's encoder at 48 px
    (192, 6, 6, 4, 64),
    (192, 6, 6, 4, 196),
]
LAYERS = ["qkv", "proj", "up", "down"]


def blocks(d: int, depth: int, heads: int, ratio: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(d, heads, ratio) for _ in range(depth)))


def step(model: nn.Module, x: torch.Tensor):
    """Forward, backward and Adam on whatever requires gradients."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def act() -> None:
        loss = model(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return act


def measure() -> list[Row]:
    """Is a LoRA training step as fast as peft's on the same transformer blocks?"""
    from peft import LoraConfig, get_peft_model

    rows = []
    for d, depth, heads, ratio, tokens in SETTINGS:
        x = torch.randn(8, tokens, d)
        ours = blocks(d, depth, heads, ratio).requires_grad_(False)
        inject(ours, lambda layer, generator: LoRA(layer, 4, 8.0, generator=generator))
        theirs = get_peft_model(
            blocks(d, depth, heads, ratio), LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)
        ).base_model.model  # without PeftModel's own forward
        arms = {
            "peft": step(theirs, x),
            "ours": step(ours, x),
            "full fine-tuning": step(blocks(d, depth, heads, ratio), x),
        }
        rows += compare(f"ViT d={d}, depth {depth}, {tokens} tokens, batch 8, r=4, alpha=8", "peft", arms)
    return rows


if __name__ == "__main__":
    main(measure)
