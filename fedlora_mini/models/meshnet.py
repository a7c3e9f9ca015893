"""MeshNet: h <- ELU(conv_d(h)) with dilations d = 1 2 4 8 16 8 4 2 1, then a 1x1x1 head; no pooling, full resolution.

A voxel sees 1 + 2 * 46 = 93 voxels along each axis with 87,183 parameters (20 channels, 3 classes). The weights are
brainchop's tissue model (background, white matter, grey matter), trained on whole T1 volumes. It expects the axes of a
"conformed" volume, which for an array in RAS order is `x[::-1].transpose(0, 2, 1)[:, ::-1]`, and `quantile_scale`:
on the MNI152 template cropped to the head its Dice is then 0.86 for white and for grey matter, unscaled 0.47.

Fedorov et al., "End-to-end learning of brain tissue segmentation from imperfect labeling", IJCNN 2017; weights: github
neuroneural/brainchop, commit 4c87885, public/models/model20chan3cls, MIT.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.data.fetch import expect_sha256, home, obtain
from fedlora_mini.errors import FedloraError
from fedlora_mini.models.tfjs import Layer, read_layers_model
from fedlora_mini.state import State

DILATIONS = (1, 2, 4, 8, 16, 8, 4, 2, 1)
FOLDER = "weights/meshnet"  # under home()
REPOSITORY = "https://raw.githubusercontent.com/neuroneural/brainchop/4c87885"
FILES = {  # name: (address, sha256)
    "model.json": (
        f"{REPOSITORY}/public/models/model20chan3cls/model.json",
        "53932edad5330073bbac906049a31b84a2ca3d8c65d658feea848130004b984b",
    ),
    "model.bin": (
        f"{REPOSITORY}/public/models/model20chan3cls/model.bin",
        "aecc03e3db596bfffab0ea1143f0848dbf4da4e317e04ef202986c6888cd467f",
    ),
    "LICENSE": (f"{REPOSITORY}/LICENSE", "53f9bf39e703ef346d556fe4e7be7d0f702f90bb8ff36bfed1fe9fabdd639e3e"),
}
NOTES = {
    "classes": ["background", "white matter", "grey matter"],
    "licence": "MIT, Copyright (c) 2021 neuroneural/brainchop",
    "source": FILES["model.json"][0],
}


class MeshNet(nn.Module):
    """(N, channels, D, H, W) -> logits (N, classes, D, H, W), any size. More than one channel is averaged to one.

    Regions: `encoder` is the layers up to and with the largest dilation (the field of view grows), `decoder` the ones
    after it (it narrows again), `head` the last 1x1x1. On a CPU one 32^3 volume takes four times as long as 33^3:
    PyTorch has a fast dilated convolution, but only for N > 1 or channels * D * H > 20,480. Adapted by LoRA:

    >>> from fedlora_mini.adapters import prepare
    >>> from fedlora_mini.losses import segmentation_loss
    >>> from fedlora_mini.models import load_base
    >>> model = prepare(load_base("meshnet", 2, (32, 32, 32), base="meshnet-brain"), "lora", rank=2)
    >>> axis = torch.arange(32.0)
    >>> z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    >>> ball = ((z - 12) ** 2 + (y - 16) ** 2 + (x - 18) ** 2 < 64).long()
    >>> masks = torch.stack([ball, ball.flip(0)])  # (2, 32, 32, 32)
    >>> images = (0.3 + 0.4 * masks[:, None]).expand(-1, 3, -1, -1, -1)
    >>> optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    >>> losses = []
    >>> for step in range(4):
    ...     loss = segmentation_loss(model(images), masks).mean()
    ...     optimiser.zero_grad()
    ...     loss.backward()
    ...     optimiser.step()
    ...     losses.append(loss.item())
    >>> losses[-1] < 0.9 * losses[0]
    True
    """

    def __init__(
        self, classes: int = 3, channels: int = 1, width: int = 20, dilations: tuple[int, ...] = DILATIONS
    ) -> None:
        super().__init__()
        self.channels = channels
        sizes = [1] + [width] * len(dilations)
        layers = [nn.Conv3d(c, width, 3, padding=d, dilation=d) for c, d in zip(sizes[:-1], dilations, strict=True)]
        middle = dilations.index(max(dilations)) + 1
        self.encoder, self.decoder = nn.ModuleList(layers[:middle]), nn.ModuleList(layers[middle:])
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or x.shape[1] != self.channels:
            raise FedloraError(f"MeshNet needs (N, {self.channels}, D, H, W), got {tuple(x.shape)}")
        first, *others = (*self.encoder, *self.decoder)
        h = F.elu(first(x.mean(1, keepdim=True)))
        h = h.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last: half the time; `vmap` knows no memory_format
        for layer in others:
            h = F.elu(layer(h))
        return self.head(h)


def quantile_scale(x: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """(x - q_low) / (q_high - q_low) with each image's own quantiles, not clipped. x: (N, …).

    What the pre-trained weights were made for (the note at the head of their model.json), on a volume cropped to the
    head. It takes out a site's brightness and contrast, so it belongs to the data, not into the network.
    """
    ordered = x.flatten(1).sort(1).values  # (N, voxels); torch.quantile refuses more than 2^24
    last = ordered.shape[1] - 1
    shape = (-1, *(1,) * (x.dim() - 1))
    bottom, top = (ordered[:, round(q * last)].view(shape) for q in (low, high))
    if (bottom == top).any():
        raise FedloraError(
            f"an image has the same {low:.0%} and {high:.0%} quantile; crop the air around the body first"
        )
    return (x - bottom) / (top - bottom)


def architecture(layers: list[Layer]) -> dict[str, Any]:
    """The options of the `MeshNet` that a chain of Keras layers describes; raises if they describe another network."""
    convolutions = [layer["config"] for layer in layers if layer["class_name"] == "Conv3D"]
    if len(convolutions) < 2:
        raise FedloraError(f"a MeshNet has at least two Conv3D layers, not {len(convolutions)}")
    *body, head = convolutions
    chain = ["InputLayer", *["Conv3D", "Activation"] * len(body), "Conv3D"]
    if [layer["class_name"] for layer in layers] != chain:
        raise FedloraError("the layers are no MeshNet: convolutions with an activation after each but the last")
    common = {"strides": [1, 1, 1], "padding": "same", "data_format": "channels_last", "activation": "linear"}
    inner = common | {"use_bias": True, "kernel_size": [3, 3, 3], "filters": body[0]["filters"]}
    last = common | {"use_bias": True, "kernel_size": [1, 1, 1], "dilation_rate": [1, 1, 1]}
    expected = [inner | {"dilation_rate": [config["dilation_rate"][0]] * 3} for config in body] + [last]
    for config, wanted in zip(convolutions, expected, strict=True):
        for key, value in wanted.items():
            if config.get(key) != value:
                raise FedloraError(f"'{config['name']}' of a MeshNet has {key} {value}, not {config.get(key)}")
    for layer in layers:
        if layer["class_name"] == "Activation" and layer["config"]["activation"] != "elu":
            raise FedloraError(f"MeshNet's activation is elu, not {layer['config']['activation']}")
    return {
        "classes": head["filters"],
        "width": body[0]["filters"],
        "dilations": tuple(config["dilation_rate"][0] for config in body),
    }


def load_tfjs(path: Path) -> MeshNet:
    """The network that a TensorFlow.js `model.json` describes, with its weights."""
    layers, arrays = read_layers_model(path)
    model = MeshNet(**architecture(layers))
    names = [layer["config"]["name"] for layer in layers if layer["class_name"] == "Conv3D"]
    for name, layer in zip(names, (*model.encoder, *model.decoder, model.head), strict=True):
        kernel = torch.tensor(arrays[f"{name}/kernel"]).permute(4, 3, 0, 1, 2)  # (D, H, W, c_in, c_out) -> ours
        layer.load_state_dict({"weight": kernel, "bias": torch.tensor(arrays[f"{name}/bias"])})
    return model


def folder() -> Path:
    """Where the weights lie: in the cache, or in `meshnet/` of the local copy that $FEDLORA_WEIGHTS_MIRROR names."""
    mirror = os.environ.get("FEDLORA_WEIGHTS_MIRROR")
    for place in [home() / FOLDER] + ([Path(mirror).expanduser() / "meshnet"] if mirror else []):
        if all((place / name).is_file() for name in FILES):
            return place
    raise FedloraError(
        "the weights of MeshNet are not on this machine; run `python data_scripts/weights.py` (380 KB), or call "
        "fedlora_mini.models.meshnet.fetch()"
    )


def fetch(source: str | None = None) -> Path:
    """Put the verified files into the cache, from `source` (a folder, or the http(s) address of one) or their home."""
    target = home() / FOLDER
    for name, (address, digest) in FILES.items():
        place = f"{source.rstrip('/')}/{name}" if source else None
        found = obtain(f"{FOLDER}/{name}", address, expect_sha256(digest), place)
        if found != target / name:
            target.mkdir(parents=True, exist_ok=True)
            part = target / f"{name}.part"
            shutil.copyfile(found, part)
            os.replace(part, target / name)
    return target


def read_weights() -> tuple[State, dict[str, Any]]:
    """(tensors, notes) of the pre-trained network; the files are checked by sha256 before they are read."""
    place = folder()
    for name, (_, digest) in FILES.items():
        expect_sha256(digest)(place / name)
    return load_tfjs(place / "model.json").state_dict(), NOTES
