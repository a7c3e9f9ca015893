"""What do per-sample gradients with clipping cost beside a non-private step?"""

import warnings

import torch
from timing import Row, compare, main
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedlora_mini.adapters import LoRA, call, inject, prepare, trainable
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.privacy import clip_sum
from fedlora_mini.state import clone

warnings.filterwarnings("ignore")
KINDS = (nn.Linear, nn.Conv2d)  # what peft and Opacus both know
C = 1.0


def plain(model: nn.Module, x: Tensor, y: Tensor):
    """The non-private gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(segmentation_loss(model(x), y).mean(), trained)


def plain_call(model: nn.Module, x: Tensor, y: Tensor):
    """The same by `functional_call`, as the federation takes its steps."""
    state = {name: value.requires_grad_() for name, value in clone(trainable(model)).items()}
    return lambda: torch.autograd.grad(segmentation_loss(call(model, state, x), y).mean(), list(state.values()))


def ours(model: nn.Module, x: Tensor, y: Tensor):
    state = trainable(model)
    return lambda: clip_sum(per_sample_gradients(model, state, segmentation_loss, x, y)[0], C)


def by_vmap(model: nn.Module, x: Tensor, y: Tensor):
    state = trainable(model)
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in state} | dict(model.named_buffers())

    def loss(state: dict[str, Tensor], image: Tensor, mask: Tensor) -> Tensor:
        return segmentation_loss(functional_call(model, state | rest, (image[None],)), mask[None]).sum()

    rows = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda: clip_sum(rows(state, x, y), C)


def by_opacus(name: str, x: Tensor, y: Tensor):
    """peft's LoRA with Opacus' hooks, and the numbers of rows that they return."""
    from opacus import GradSampleModule
    from peft import LoraConfig, get_peft_model

    base = zoo.build(name, classes=2)
    targets = [path for path, module in base.named_modules() if isinstance(module, KINDS)]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=targets)).base_model.model.train()
    hooked = GradSampleModule(model, strict=False, loss_reduction="sum")
    trained = {n: p for n, p in hooked.named_parameters() if p.requires_grad}

    def act() -> None:
        for p in trained.values():
            p.grad = p.grad_sample = None
        segmentation_loss(hooked(x), y).sum().backward()
        rows = {n: p.grad_sample for n, p in trained.items()}
        if len({g.shape[0] for g in rows.values()}) == 1:  # else there is no per-sample norm to clip by
            clip_sum(rows, C)

    act()
    return act, sorted({p.grad_sample.shape[0] for p in trained.values()})


def measure() -> list[Row]:
    """What do per-sample gradients with clipping cost beside a non-private step?"""
    rows = []
    for name, size, n in (("minisam", 48, 8), ("unet", 64, 8), ("swin_unetr", 64, 8)):
        g = torch.Generator().manual_seed(0)
        x = torch.rand(n, 3, size, size, generator=g)
        y = (x.mean(1) > 0.5).to(torch.uint8)
        setting = f"{name}, {size} px, batch {n}"
        model = prepare(zoo.build(name, classes=2), "lora", rank=4)
        arms = {
            "non-private": plain(model, x, y),
            "non-private, functional_call": plain_call(model, x, y),
            "ours": ours(model, x, y),
        }
        rows += compare(f"{setting}, every layer", "non-private", arms)

        model = zoo.build(name, classes=2).requires_grad_(False).eval()
        inject(
            model,
            lambda layer, generator: LoRA(layer, 4, generator=generator),
            lambda path, module: isinstance(module, KINDS),
        )
        hooks, returned = by_opacus(name, x, y)
        label = "peft + Opacus hooks"
        if returned != [n]:
            label += f" (wrong: {', '.join(map(str, returned))} rows for {n} images)"
        arms = {
            "non-private": plain(model, x, y),
            "ours": ours(model, x, y),
            "vmap(grad)": by_vmap(model, x, y),
            label: hooks,
        }
        rows += compare(f"{setting}, Linear and Conv2d", "non-private", arms, rounds=7)
    return rows


if __name__ == "__main__":
    main(measure)
