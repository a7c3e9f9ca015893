"""Every network of the table: built the same from a seed, divided into regions, trained by LoRA."""

import pytest
import torch

from fedlora_mini.adapters import prepare, trainable
from fedlora_mini.adapters.base import REGIONS, keys
from fedlora_mini.adapters.ops import matrix_shape
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo
from fedlora_mini.state import digest

SLOW = {"swin_unetr3d"}
NETWORKS = [pytest.param(name, marks=pytest.mark.slow) if name.endswith("3d") else name for name in zoo.MODELS]


def batch(name, n=2):
    entry = zoo.MODELS[name]
    size = 64 if name == "unetr" else entry.smallest  # UNETR is built for one size
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(n, *(size // 4,) * entry.dims, generator=g) > 0.6).to(torch.uint8)
    for axis in range(1, entry.dims + 1):
        y = y.repeat_interleave(4, axis)  # blocks of four voxels a side
    x = 0.2 * torch.rand(n, 3, *y.shape[1:], generator=g) + 0.6 * y[:, None]
    return x, y


@pytest.mark.parametrize("name", NETWORKS)
def test_lora_trains_it(name):
    model = prepare(zoo.build(name, classes=2), "lora")
    x, y = batch(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2 if name in SLOW else 6):
        logits = model(x)
        assert logits.shape == (len(x), 2, *y.shape[1:])
        loss = segmentation_loss(logits, y).mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert before and all(torch.equal(value, after[n]) for n, value in before.items())
    assert all(torch.equal(value, buffers[n]) for n, value in model.named_buffers())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_trained_name_has_a_region_and_all_three_occur(name):
    model = prepare(zoo.build(name, classes=2), "lora")
    found = keys(model, list(trainable(model)))
    assert {key.region for key in found.values()} == set(REGIONS)
    heads = {key.path for key in found.values() if key.region == "head"}
    assert {key.factor for key in found.values() if key.region == "head"} == {"D", "d"}
    for path in heads:  # what makes the classes, and nothing else (MONAI's UNet makes them in its last two layers)
        assert matrix_shape(model.get_submodule(path).base)[0] == 2


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_parameter_has_a_region(name):
    model = prepare(zoo.build(name, classes=2), "full")
    assert {key.region for key in keys(model, list(trainable(model))).values()} == set(REGIONS)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_seed_alone_makes_the_weights(name):
    before = torch.get_rng_state()
    first = digest(zoo.build(name, classes=2, seed=1).state_dict())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    assert digest(zoo.build(name, classes=2, seed=1).state_dict()) == first
    assert digest(zoo.build(name, classes=2, seed=2).state_dict()) != first


def test_classes_and_channels():
    model = zoo.build("unet", classes=5, channels=1)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5, 32, 32)


@pytest.mark.parametrize("name", [n for n in zoo.MODELS if n not in SLOW])
def test_the_smallest_size_is_accepted_and_works(name):
    entry = zoo.MODELS[name]
    size = (entry.smallest,) * entry.dims
    zoo.check_size(name, size)
    options = {"img_size": size} if name.startswith("unetr") else {}
    with torch.no_grad():
        assert zoo.build(name, classes=2, **options).eval()(torch.rand(1, 3, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("unet", (32, 32, 32), "is 2D, the images are 3D"),
        ("unet3d", (32, 32), "is 3D, the images are 2D"),
        ("swin_unetr", (48, 64), "multiples of 32 and at least 64, the images are 48 x 64"),
        ("swin_unetr3d", (32, 32, 32), "at least 64"),
        ("segresnet", (20, 24), "multiples of 8"),
    ],
)
def test_sizes_that_do_not_fit(name, size, message):
    with pytest.raises(FedloraError, match=message):
        zoo.check_size(name, size)


def test_unknown_names():
    with pytest.raises(FedloraError, match=r"unknown model 'swin_unter'.*Did you mean 'swin_unetr'"):
        zoo.build("swin_unter", classes=2)
    with pytest.raises(FedloraError, match=r"unknown model 'unett'"):
        zoo.check_size("unett", (32, 32))


def test_unknown_options():
    with pytest.raises(FedloraError, match=r"'minisam' does not take these options.*widht"):
        zoo.build("minisam", classes=2, widht=8)


def test_minisam_refuses_other_shapes():
    with pytest.raises(FedloraError, match=r"multiples of 4"):
        zoo.build("minisam", classes=2)(torch.rand(1, 3, 30, 32))
