"""What does a private step (a gradient per image, clipping, noise) cost beside a non-private one?"""

import warnings

import torch
from timing import Row, compare, main
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedlora_mini.adapters import LoRA, call, inject, prepare, trainable
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.privacy import DPSGD, Seeded, add_noise, clip_sum
from fedlora_mini.state import State, clone

warnings.filterwarnings("ignore")
KINDS = (nn.Linear, nn.Conv2d)  # what peft and Opacus both know
C, SIGMA, N = 1.0, 1.0, 320  # N: images of the client, whose expected batch is the one that is measured
SOURCE = Seeded(torch.Generator().manual_seed(0))


def noised(total: State) -> State:
    """What every private arm does last."""
    return add_noise(total, SIGMA * C, SOURCE)


def plain(model: nn.Module, x: Tensor, y: Tensor):
    """The non-private gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(segmentation_loss(model(x), y).mean(), trained)


def plain_call(model: nn.Module, x: Tensor, y: Tensor):
    """The same by `functional_call`, as the federation takes its steps."""
    state = {name: value.requires_grad_() for name, value in clone(trainable(model)).items()}
    return lambda: torch.autograd.grad(segmentation_loss(call(model, state, x), y).mean(), list(state.values()))


def ours(model: nn.Module, x: Tensor, y: Tensor):
    state, mechanism = trainable(model), DPSGD(SIGMA, len(x) / N, C)
    return lambda: mechanism.gradient(model, state, segmentation_loss, x, y, N, SOURCE)


def by_vmap(model: nn.Module, x: Tensor, y: Tensor):
    state = trainable(model)
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in state} | dict(model.named_buffers())

    def loss(state: dict[str, Tensor], image: Tensor, mask: Tensor) -> Tensor:
        return segmentation_loss(functional_call(model, state | rest, (image[None],)), mask[None]).sum()

    rows = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda: noised(clip_sum(rows(state, x, y), C))


def in_peft(name: str) -> nn.Module:
    """The same LoRA by peft: Opacus cannot hook our factors."""
    from peft import LoraConfig, get_peft_model

    base = zoo.build(name, classes=2)
    targets = [path for path, module in base.named_modules() if isinstance(module, KINDS)]
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=targets)).base_model.model.train()


def trained_of(hooked: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in hooked.named_parameters() if p.requires_grad}


def by_hooks(name: str, x: Tensor, y: Tensor):
    """Opacus' hooks, and the numbers of rows that they return."""
    from opacus import GradSampleModule

    hooked = GradSampleModule(in_peft(name), strict=False, loss_reduction="sum")
    trained = trained_of(hooked)

    def act() -> None:
        for p in trained.values():
            p.grad = p.grad_sample = None
        segmentation_loss(hooked(x), y).sum().backward()
        rows = {n: p.grad_sample for n, p in trained.items()}
        if len({g.shape[0] for g in rows.values()}) == 1:  # else there is no per-sample norm to clip by
            noised(clip_sum(rows, C))

    act()
    return act, sorted({p.grad_sample.shape[0] for p in trained.values()})


def by_ghosts(name: str, x: Tensor, y: Tensor):
    """Opacus' ghost clipping: norms without gradients in one backward pass, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    hooked = GradSampleModuleFastGradientClipping(
        in_peft(name), strict=False, loss_reduction="sum", max_grad_norm=C, use_ghost_clipping=True
    )
    trained = trained_of(hooked)

    def act() -> None:
        hooked.enable_hooks()
        losses = segmentation_loss(hooked(x), y)
        losses.sum().backward(retain_graph=True)
        found = [getattr(p, "_norm_sample", None) for p in trained.values()]
        right = all(norms is not None and len(norms) == len(x) for norms in found)  # else there is nothing to clip by
        factors = hooked.get_clipping_coef() if right else torch.ones(len(x))
        hooked.disable_hooks()
        for p in trained.values():
            p.grad = None
        (factors * losses).sum().backward()
        noised({n: p.grad for n, p in trained.items()})
        for p in trained.values():
            p.grad = None

    try:
        act()
        act()
    except NotImplementedError:  # layers whose output reaches no loss count as tied from the second step on
        return None
    return act


def measure() -> list[Row]:
    """What does a private step (a gradient per image, clipping, noise) cost beside a non-private one?"""
    rows = []
    for name, size in (("minisam", 48), ("unet", 64), ("swin_unetr", 64)):
        for n in (8, 16, 32):
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
            rows += compare(f"{setting}, every layer", "non-private", arms, rounds=9, memory=True)

            model = zoo.build(name, classes=2).requires_grad_(False).eval()
            inject(
                model,
                lambda layer, generator: LoRA(layer, 4, generator=generator),
                lambda path, module: isinstance(module, KINDS),
            )
            hooks, returned = by_hooks(name, x, y)
            wrong = "" if returned == [n] else f" (wrong: {', '.join(map(str, returned))} rows for {n} images)"
            arms = {
                "non-private": plain(model, x, y),
                "ours": ours(model, x, y),
                "vmap(grad)": by_vmap(model, x, y),
                f"peft + Opacus hooks{wrong}": hooks,
            }
            if (ghosts := by_ghosts(name, x, y)) is not None:
                arms["peft + Opacus ghost clipping"] = ghosts
            rows += compare(f"{setting}, Linear and Conv2d", "non-private", arms, rounds=5, memory=True)
    return rows


if __name__ == "__main__":
    main(measure)
