"""MeshNet: read from TensorFlow.js' format, the same function as a loop over taps, adapted by LoRA; real weights."""

import doctest
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import adapters, call, merge, prepare, trainable, unmerge
from fedlora_mini.adapters.base import region
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import BASES, build, load_base, meshnet
from fedlora_mini.models.meshnet import MeshNet, architecture, load_tfjs, quantile_scale
from fedlora_mini.models.tfjs import read_layers_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def weights(monkeypatch):
    """The real weights: in the cache, in FEDLORA_WEIGHTS_MIRROR, or beside the local copy of the data."""
    data = os.environ.get("FEDLORA_DATA_MIRROR")
    if data and "FEDLORA_WEIGHTS_MIRROR" not in os.environ:
        monkeypatch.setenv("FEDLORA_WEIGHTS_MIRROR", str(Path(data).resolve().parent / "weights"))
    try:
        return meshnet.folder()
    except FedloraError as error:
        pytest.skip(str(error))


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """An empty cache and no local copy."""
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDLORA_WEIGHTS_MIRROR", raising=False)


def keras(dilations=(1, 2, 1), width=4, classes=2):
    """The layers of a small MeshNet as Keras writes them, and random weights for them, kernels (D, H, W, in, out)."""
    rng, layers, arrays, c = np.random.default_rng(0), [{"class_name": "InputLayer", "config": {"name": "in"}}], {}, 1
    for i, d in enumerate((*dilations, None)):
        k, out, name = (1, classes, "output") if d is None else (3, width, f"conv{i}")
        config = {
            "name": name,
            "filters": out,
            "kernel_size": [k] * 3,
            "strides": [1] * 3,
            "dilation_rate": [d or 1] * 3,
        }
        config |= {"padding": "same", "data_format": "channels_last", "activation": "linear", "use_bias": True}
        layers.append({"class_name": "Conv3D", "config": config})
        if d:
            layers.append({"class_name": "Activation", "config": {"activation": "elu"}})
        arrays[f"{name}/kernel"] = rng.normal(size=(k, k, k, c, out), scale=(k**3 * c) ** -0.5).astype(np.float32)
        arrays[f"{name}/bias"] = rng.normal(size=out).astype(np.float32)
        c = out
    return layers, arrays


def write(folder, layers, arrays, cuts=(), **changes):
    """A `model.json` and its shards, the bytes cut at `cuts`."""
    data = b"".join(a.tobytes() for a in arrays.values())
    edges = [0, *cuts, len(data)]
    names = [f"group1-shard{i}of{len(edges) - 1}.bin" for i in range(1, len(edges))]
    for name, start, end in zip(names, edges, edges[1:], strict=False):
        (folder / name).write_bytes(data[start:end])
    entries = [{"name": n, "shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()]
    model = {
        "format": "layers-model",
        "modelTopology": {"model_config": {"config": {"layers": layers}}},
        "weightsManifest": [{"paths": names, "weights": entries} | changes],
    }
    (folder / "model.json").write_text(json.dumps(model))
    return folder / "model.json"


TWO = {
    "a/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a/bias": np.array([7, -8], dtype=np.int32),
    "b/kernel": np.array([[True, False], [False, True]]),
    "b/bias": np.array(255, dtype=np.uint8),
}


@pytest.mark.parametrize("cuts", [(), (96,), (3, 50, 101)], ids=["one shard", "between arrays", "inside numbers"])
def test_arrays_come_back_as_they_were_written_however_the_shards_are_cut(tmp_path, cuts):
    layers, arrays = read_layers_model(write(tmp_path, ["first", "second"], TWO, cuts))
    assert layers == ["first", "second"] and list(arrays) == list(TWO)
    for name, value in TWO.items():
        assert arrays[name].dtype == value.dtype and np.array_equal(arrays[name], value)


def test_bytes_too_many_or_too_few_are_refused(tmp_path):
    path = write(tmp_path, [], TWO)
    shard = tmp_path / "group1-shard1of1.bin"
    data = shard.read_bytes()
    shard.write_bytes(data + b"\0")
    with pytest.raises(FedloraError, match="hold 110 bytes, its arrays take 109"):
        read_layers_model(path)
    shard.write_bytes(data[:100])
    with pytest.raises(FedloraError, match="end inside 'a/bias': 100 bytes, 104 are needed"):
        read_layers_model(path)


def entry(**changes):
    return {"weights": [{"name": "a/kernel", "shape": [2], "dtype": "float32"} | changes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ["gone.bin"]}, "shard 'gone.bin'.*missing"),
        ({"paths": ["../model.bin"]}, "not a file beside it"),
        ({"paths": ["/etc/hostname"]}, "not a file beside it"),
        (entry(dtype="float23"), "unknown dtype of 'a/kernel'.*Did you mean 'float32'"),
        (entry(quantization={"dtype": "uint8"}), "'a/kernel'.*quantised"),
        (entry(shape=[2, -1]), r"the shape \[2, -1\]"),
        (entry(shape=None), "the shape None"),
        ({"weights": 2 * entry()["weights"]}, "lists 'a/kernel' twice"),
    ],
)
def test_a_manifest_that_does_not_hold_is_one_clear_error(tmp_path, changes, message):
    path = write(tmp_path, [], TWO, **changes)
    with pytest.raises(FedloraError, match=message):
        read_layers_model(path)


def test_other_files_are_refused(tmp_path):
    for text in ("{", "[]", '{"format": "graph-model", "modelTopology": {"node": []}}'):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(FedloraError, match=r"cannot read .* as a TensorFlow\.js layers model"):
            read_layers_model(tmp_path / "model.json")


def by_taps(x, layers, arrays):
    """Keras' definition, tap by tap, (D, H, W, c): y[p, o] = b[o] + sum_{t, i} x[p + d (t - 1), i] K[t, i, o]."""
    convolutions = [layer["config"] for layer in layers if layer["class_name"] == "Conv3D"]
    for config in convolutions:
        kernel, d = arrays[f"{config['name']}/kernel"].astype(float), config["dilation_rate"][0]
        reach = d * (kernel.shape[0] // 2)
        padded = np.pad(x, [(reach, reach)] * 3 + [(0, 0)])
        y = np.zeros((*x.shape[:3], config["filters"])) + arrays[f"{config['name']}/bias"]
        for tap in itertools.product(range(kernel.shape[0]), repeat=3):
            window = tuple(slice(d * t, d * t + n) for t, n in zip(tap, x.shape, strict=False))
            y += padded[window] @ kernel[tap]
        x = y if config is convolutions[-1] else np.where(y > 0, y, np.expm1(np.minimum(y, 0)))
    return x


def test_a_file_gives_the_network_that_its_taps_define(tmp_path):
    layers, arrays = keras()
    model = load_tfjs(write(tmp_path, layers, arrays, cuts=(1000,))).double()
    x = np.random.default_rng(1).normal(size=(6, 5, 7, 1))
    expected = by_taps(x, layers, arrays)
    found = model(torch.from_numpy(x).permute(3, 0, 1, 2)[None])
    assert found.shape == (1, 2, 6, 5, 7)
    assert np.allclose(found[0].permute(1, 2, 3, 0).detach(), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        (1, {"strides": [2, 2, 2]}, r"'conv0' of a MeshNet has strides \[1, 1, 1\], not \[2, 2, 2\]"),
        (3, {"padding": "valid"}, "'conv1' of a MeshNet has padding same, not valid"),
        (3, {"dilation_rate": [2, 2, 1]}, r"dilation_rate \[2, 2, 2\], not \[2, 2, 1\]"),
        (5, {"filters": 5}, "filters 4, not 5"),
        (7, {"kernel_size": [3, 3, 3]}, r"'output' of a MeshNet has kernel_size \[1, 1, 1\]"),
        (2, {"activation": "relu"}, "activation is elu, not relu"),
    ],
)
def test_layers_of_another_network_are_refused(where, changes, message):
    layers, _ = keras()
    layers[where]["config"] |= changes
    with pytest.raises(FedloraError, match=message):
        architecture(layers)


def test_layers_in_another_order_are_refused():
    layers, _ = keras()
    with pytest.raises(FedloraError, match="an activation after each"):
        architecture([*layers[:2], *layers[3:]])
    with pytest.raises(FedloraError, match="at least two Conv3D layers, not 0"):
        architecture([])


def test_a_voxel_sees_93_voxels_along_an_axis():
    model = MeshNet(classes=1, width=1).requires_grad_(False)
    for name, value in model.named_parameters():
        value.fill_(1.0 if name.endswith("weight") else 0.0)
    impulse = torch.zeros(1, 1, 97, 1, 1)
    impulse[0, 0, 48] = 1
    seen = model(impulse).flatten().nonzero().flatten()
    assert (len(seen), int(seen[0]), int(seen[-1])) == (93, 48 - 46, 48 + 46)


def test_regions_are_cut_behind_the_largest_dilation():
    model = build("meshnet", classes=2)
    dilations = {
        name: [
            layer.dilation[0]
            for path, layer in model.named_modules()
            if path and region(model, path) == name and hasattr(layer, "dilation")
        ]
        for name in ("encoder", "decoder", "head")
    }
    assert dilations == {"encoder": [1, 2, 4, 8, 16], "decoder": [8, 4, 2, 1], "head": [1]}


def test_grey_channels_are_averaged_to_one():
    one, three = (build("meshnet", classes=2, channels=c, seed=4) for c in (1, 3))
    x = torch.rand(2, 1, 5, 6, 7)
    assert torch.allclose(one(x), three(x.expand(-1, 3, -1, -1, -1)), atol=1e-6)
    with pytest.raises(FedloraError, match=r"needs \(N, 3, D, H, W\), got \(2, 1, 5, 6, 7\)"):
        three(x)


def test_quantile_scaling_puts_an_images_own_quantiles_at_zero_and_one():
    x = torch.rand(3, 1, 11, 12, 13, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 9]).view(
        3, 1, 1, 1, 1
    )
    for image, scaled in zip(x, quantile_scale(x), strict=True):
        low, high = np.quantile(image.numpy(), [0.05, 0.95], method="nearest")
        assert np.allclose(scaled, (image.numpy() - low) / (high - low), atol=1e-5)
    assert torch.allclose(quantile_scale(0.3 * x + 0.1), quantile_scale(x), atol=1e-4)  # brightness and contrast go
    with pytest.raises(FedloraError, match="crop the air"):
        quantile_scale(torch.zeros(1, 1, 4, 4, 4))


def adapted(images=3):
    """A small MeshNet with non-zero factors, and images smaller than its largest reach."""
    g = torch.Generator().manual_seed(0)
    model = prepare(build("meshnet", classes=2, width=6).double(), "lora", rank=2)
    state = {n: v + 0.1 * torch.randn(v.shape, generator=g).double() for n, v in trainable(model).items()}
    x = torch.rand(images, 3, 9, 10, 12, generator=g).double()
    return model, state, x, (x.mean(1) > 0.5).to(torch.uint8)


def test_every_dilated_convolution_is_adapted_and_merging_changes_nothing():
    model, state, x, _ = adapted()
    model.load_state_dict(state, strict=False)
    found = {path: adapter.base.dilation[0] for path, adapter in adapters(model) if path != "head"}
    assert list(found.values()) == list(meshnet.DILATIONS)
    expected, plain = model(x), model.encoder[4].base.weight.clone()
    assert torch.allclose(merge(model)(x), expected, atol=1e-12)
    assert not torch.equal(model.encoder[4].base.weight, plain)
    assert torch.equal(unmerge(model).encoder[4].base.weight, plain)


def test_gradients_per_sample_equal_a_loop():
    model, state, x, y = adapted()
    rows, _ = per_sample_gradients(model, state, segmentation_loss, x, y)
    for i, row in enumerate(S.unstack(rows)):
        leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
        loss = segmentation_loss(call(model, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        alone = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        assert S.norm(alone) > 0 and S.norm(S.sub(row, alone)) < 1e-10 * S.norm(alone)


def test_without_the_weights_the_error_says_what_to_run(nothing_here):
    with pytest.raises(FedloraError, match=r"run `python data_scripts/weights\.py`"):
        load_base("meshnet", 3, (32, 32, 32), base="meshnet-brain")
    load_base("meshnet", 3, (32, 32, 32))  # "auto" does not depend on what lies on the disk


def test_a_base_is_for_its_own_network_and_its_name_must_be_right(nothing_here):
    with pytest.raises(FedloraError, match="is for model 'meshnet', not for 'unet3d'"):
        load_base("unet3d", 2, (32, 32, 32), base="meshnet-brain")
    with pytest.raises(
        FedloraError, match="'meshnet-brian': no such file; accepted: auto, none, meshnet-brain, imagenet"
    ):
        load_base("meshnet", 2, (32, 32, 32), base="meshnet-brian")


def test_damaged_weights_are_refused(weights, tmp_path, nothing_here, monkeypatch):
    shutil.copytree(weights, tmp_path / "copy" / "meshnet")
    data = bytearray((weights / "model.bin").read_bytes())
    data[1000] ^= 1
    shard = tmp_path / "copy" / "meshnet" / "model.bin"
    shard.chmod(0o644)
    shard.write_bytes(data)
    monkeypatch.setenv("FEDLORA_WEIGHTS_MIRROR", str(tmp_path / "copy"))
    with pytest.raises(FedloraError, match=r"model\.bin is corrupt"):
        load_base("meshnet", 2, (32, 32, 32), base="meshnet-brain")


def test_the_real_file_describes_the_default_network(weights):
    layers, arrays = read_layers_model(weights / "model.json")
    assert architecture(layers) == {"classes": 3, "width": 20, "dilations": meshnet.DILATIONS}
    assert sum(a.size for a in arrays.values()) == sum(p.numel() for p in MeshNet().parameters()) == 87_183
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}
    assert (weights / "model.bin").stat().st_size == 4 * 87_183
    note = json.loads((weights / "model.json").read_text())["_comment"]
    assert "min = 5% quantile, max = 95% quantile" in note  # what quantile_scale does
    assert "MIT License" in (weights / "LICENSE").read_text()


def test_the_same_task_keeps_the_head_and_a_new_one_draws_it_from_the_seed(weights):
    tensors, notes = BASES["meshnet-brain"].read()
    assert notes["classes"] == ["background", "white matter", "grey matter"] and notes["licence"].startswith("MIT")
    same = load_base("meshnet", 3, (16, 16, 16), base="meshnet-brain", same_task=True)
    assert S.digest(same.state_dict()) == S.digest(tensors)
    new, again, other = (load_base("meshnet", 2, (16, 16, 16), base="meshnet-brain", seed=s) for s in (0, 0, 1))
    assert torch.equal(new.encoder[4].weight, tensors["encoder.4.weight"])
    assert torch.equal(new.head.weight, again.head.weight) and not torch.equal(new.head.weight, other.head.weight)
    with pytest.raises(FedloraError, match=r"does not fit model 'meshnet': 'head\.weight'"):
        load_base("meshnet", 2, (16, 16, 16), base="meshnet-brain", same_task=True)


@pytest.mark.slow
def test_the_example_in_the_documentation_runs(weights):
    result = doctest.testmod(meshnet)
    assert result.attempted >= 10 and result.failed == 0


def dice(a, b):
    return 2 * int((a & b).sum()) / int(a.sum() + b.sum())


@pytest.mark.slow
def test_it_segments_the_mni152_brain(weights):
    """Cropped to the head: 4 million voxels, 25 s on one core, 1.9 GB. Truth: the template's maps, at one half."""
    datasets = pytest.importorskip("nilearn.datasets")
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    volumes = [np.asarray(load(resolution=1).dataobj, np.float32) for load in loaders]  # (197, 233, 189), RAS
    head = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(volumes[0]))
    t1, grey, white = (torch.from_numpy(v[head][::-1].transpose(0, 2, 1)[:, ::-1].copy()) for v in volumes)
    model = load_base("meshnet", 3, t1.shape, base="meshnet-brain", same_task=True).eval()

    def tissue(image):
        with torch.inference_mode():
            return model(image[None, None].expand(-1, 3, -1, -1, -1))[0].argmax(0)

    scaled = quantile_scale(t1[None])[0]
    found = tissue(scaled)
    assert math.isclose(dice(found == 1, white >= 0.5), 0.862, abs_tol=0.01)
    assert math.isclose(dice(found == 2, grey >= 0.5), 0.863, abs_tol=0.01)
    part = (slice(0, 80), slice(0, 90), slice(0, 80))  # seen alone, without its surroundings
    from_scaled, from_raw = (dice(tissue(image[part]) == 1, white[part] >= 0.5) for image in (scaled, t1))
    assert from_raw < 0.4 and from_scaled > 0.7  # in the template's own range [0, 1] it does not work
