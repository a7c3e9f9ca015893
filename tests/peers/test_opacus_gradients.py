"""Per-sample gradients against vmap and Opacus' hooks: equal where those are right; a network where they are not."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

pytestmark = pytest.mark.peers
pytest.importorskip("opacus", reason="opacus is not installed here: run `make peers`")
peft = pytest.importorskip("peft", reason="peft is not installed here: run `make peers`")

from opacus import GradSampleModule  # noqa: E402

from fedlora_mini.adapters import LoRA, adapters, inject, prepare, trainable  # noqa: E402
from fedlora_mini.adapters.grouped import per_sample_gradients  # noqa: E402
from fedlora_mini.adapters.io import save  # noqa: E402
from fedlora_mini.losses import segmentation_loss  # noqa: E402
from fedlora_mini.models import zoo  # noqa: E402
from fedlora_mini.privacy import norms  # noqa: E402


def setting(name, n=3):
    g = torch.Generator().manual_seed(0)
    model = prepare(zoo.build(name, classes=2), "lora", rank=2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    x = torch.rand(n, 3, *(zoo.MODELS[name].smallest,) * 2, generator=g)
    return model, x, (x.mean(1) > 0.5).to(torch.uint8)


@pytest.mark.parametrize("name", ["minisam", "unet", "swin_unetr"])
def test_norms_equal_those_of_vmap(name):
    model, x, y = setting(name)
    state = trainable(model)
    frozen = {n: p.detach() for n, p in model.named_parameters() if n not in state}
    frozen |= dict(model.named_buffers())

    def loss(state, image, mask):
        return segmentation_loss(functional_call(model, state | frozen, (image[None],)), mask[None]).sum()

    theirs = vmap(grad(loss), in_dims=(None, 0, 0))(state, x, y)
    found, _ = per_sample_gradients(model, state, segmentation_loss, x, y)
    assert torch.allclose(norms(found), norms(theirs), rtol=1e-4)


def with_hooks(name, folder):
    """The same LoRA on the encoder's Linear and Conv2d layers: ours, and in peft with Opacus' hooks."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    start = "encoder" if name == "minisam" else "swinViT.layers"
    model = zoo.build(name, classes=2).requires_grad_(False).eval()
    inject(
        model,
        lambda layer, generator: LoRA(layer, 2, generator=generator),
        lambda path, module: path.startswith(start) and isinstance(module, kinds),
    )
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.B, std=0.05)
    save(model, folder, format="peft")
    theirs = peft.PeftModel.from_pretrained(zoo.build(name, classes=2).eval(), str(folder), is_trainable=True)
    return model, GradSampleModule(theirs.base_model.model.train(), strict=False, loss_reduction="sum")


def rows(hooked, x, y):
    segmentation_loss(hooked(x), y).sum().backward()
    return {n: p.grad_sample for n, p in hooked.named_parameters() if p.requires_grad}


def test_norms_equal_those_of_opacus(tmp_path):
    _, x, y = setting("minisam")
    model, hooked = with_hooks("minisam", tmp_path)
    theirs = rows(hooked, x, y)
    found, _ = per_sample_gradients(model, trainable(model), segmentation_loss, x, y)
    assert len(theirs) == len(found)
    assert torch.allclose(norms(found), norms(theirs), rtol=1e-4)


def test_hooks_see_windows_where_we_see_images(tmp_path):
    """Inside SwinUNETR a layer's batch is images x windows: hooks return a row a window, silently, and clip those."""
    _, x, y = setting("swin_unetr")
    model, hooked = with_hooks("swin_unetr", tmp_path)
    theirs = {g.shape[0] for g in rows(hooked, x, y).values()}
    found, _ = per_sample_gradients(model, trainable(model), segmentation_loss, x, y)
    assert {g.shape[0] for g in found.values()} == {len(x)}
    assert max(theirs) > len(x)
