"""Networks by name, MONAI's and our own, each with its regions written down. One row a network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.models.efficientnet import EfficientUNet
from fedlora_mini.models.meshnet import MeshNet
from fedlora_mini.models.minisam import MiniSAM
from fedlora_mini.models.vit import ViT


@dataclass(frozen=True)
class Entry:
    """How a network is built (`build(classes, channels, **options)`) and which paths are which region (first match)."""

    build: Callable[..., nn.Module]
    regions: tuple[tuple[str, str], ...]
    dims: int
    multiple: int  # image sides are multiples of it …
    smallest: int  # … and at least this long
    summary: str


def _monai(network: str, dims: int, **defaults: Any) -> Callable[..., nn.Module]:
    """A builder for a MONAI network, imported when it is called. `features` is what MONAI's UNets call channels."""

    def build(classes: int, channels: int, **options: Any) -> nn.Module:
        from monai.networks import nets

        options = defaults | options
        if "features" in options:
            options["channels"] = options.pop("features")
        return getattr(nets, network)(spatial_dims=dims, in_channels=channels, out_channels=classes, **options)

    return build


def _unet(dims: int, **more: Any) -> Callable[..., nn.Module]:
    return _monai("UNet", dims, features=(16, 32, 64), strides=(2, 2), num_res_units=2, **more)


def _attention_unet(dims: int) -> Callable[..., nn.Module]:
    return _monai("AttentionUnet", dims, features=(16, 32, 64), strides=(2, 2))


def _unetr(dims: int) -> Callable[..., nn.Module]:
    size = (64,) * dims if dims == 2 else (32,) * dims
    return _monai("UNETR", dims, img_size=size, feature_size=8, hidden_size=96, mlp_dim=192, num_heads=4)


def _swin_unetr(dims: int) -> Callable[..., nn.Module]:
    return _monai("SwinUNETR", dims, feature_size=12)


def _segresnet(dims: int) -> Callable[..., nn.Module]:
    return _monai("SegResNet", dims, init_filters=8, blocks_down=(1, 2, 2), blocks_up=(1, 1))


_TRANSFORMER = ((r"out\b", "head"), (r"decoder", "decoder"), (r"swinViT|vit|encoder", "encoder"))
_UNET = ((r"model\.2\b", "head"), (r"model(\.1\.submodule)+\.2\b", "decoder"), (r"model", "encoder"))
_ATTENTION = ((r"model\.2\b", "head"), (r"model.*\b(attention|upconv|merge)\b", "decoder"), (r"model", "encoder"))
_RESNET = ((r"conv_final", "head"), (r"up_", "decoder"), (r"convInit|down_layers", "encoder"))
_OWN = ((r"encoder", "encoder"), (r"decoder", "decoder"), (r"head", "head"))

MODELS: dict[str, Entry] = {
    "minisam": Entry(MiniSAM, _OWN, 2, 4, 16, "ViT encoder + convolutional decoder; ships with pre-trained weights"),
    "unet": Entry(_unet(2), _UNET, 2, 4, 16, "MONAI UNet with residual units; its norms have nothing to train"),
    "unet3d": Entry(_unet(3), _UNET, 3, 4, 16, "the same in 3D"),
    "unet_bn": Entry(_unet(2, norm="batch"), _UNET, 2, 4, 16, "MONAI UNet with batch norms, which FedBN keeps"),
    "attention_unet": Entry(_attention_unet(2), _ATTENTION, 2, 4, 16, "MONAI AttentionUnet"),
    "attention_unet3d": Entry(_attention_unet(3), _ATTENTION, 3, 4, 16, "the same in 3D"),
    "unetr": Entry(_unetr(2), _TRANSFORMER, 2, 16, 32, "MONAI UNETR: ViT encoder; built for one image size"),
    "unetr3d": Entry(_unetr(3), _TRANSFORMER, 3, 16, 32, "the same in 3D"),
    "swin_unetr": Entry(_swin_unetr(2), _TRANSFORMER, 2, 32, 64, "MONAI SwinUNETR: shifted-window encoder"),
    "swin_unetr3d": Entry(_swin_unetr(3), _TRANSFORMER, 3, 32, 64, "the same in 3D"),
    "segresnet": Entry(_segresnet(2), _RESNET, 2, 8, 16, "MONAI SegResNet: residual encoder, light decoder"),
    "segresnet3d": Entry(_segresnet(3), _RESNET, 3, 8, 16, "the same in 3D"),
    "meshnet": Entry(MeshNet, _OWN, 3, 1, 16, "dilated 3D convolutions; base meshnet-brain: brain tissue from T1"),
    "efficientnet": Entry(EfficientUNet, _OWN, 2, 32, 32, "EfficientNet-lite0 with a light decoder; base imagenet"),
}
"""Segmenters: logits (N, classes, *S)."""

CLASSIFIERS: dict[str, Entry] = {
    "vit": Entry(ViT, _OWN, 2, 4, 8, "small ViT, one label an image; its base has learnt other digits, mirrored"),
}
"""Networks that give an image one label: logits (N, classes). They have no decoder."""


def entry(name: str) -> Entry:
    """The row of that name in either table."""
    if name not in MODELS | CLASSIFIERS:
        raise unknown("model", name, MODELS | CLASSIFIERS)
    return (MODELS | CLASSIFIERS)[name]


def check_task(name: str, task: str) -> None:
    """Raise unless the network is made for "segmentation", or "classification", whichever it is."""
    own, other = (MODELS, CLASSIFIERS) if task == "segmentation" else (CLASSIFIERS, MODELS)
    if name in other:
        raise FedloraError(f"model '{name}' is not made for {task}; accepted: {', '.join(own)}")


def build(name: str, classes: int, channels: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    """A network of the table with random weights from `seed`, with its regions; the global generator is restored."""
    row = entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = row.build(classes, channels, **options)
        except TypeError as error:
            raise FedloraError(f"model '{name}' does not take these options: {error}") from None
    model.regions = row.regions  # type: ignore[assignment]
    return model


def check_size(name: str, spatial: tuple[int, ...]) -> None:
    """Raise unless images of this size fit the network."""
    row = entry(name)
    if len(spatial) != row.dims:
        raise FedloraError(f"model '{name}' is {row.dims}D, the images are {len(spatial)}D")
    if any(side % row.multiple or side < row.smallest for side in spatial):
        raise FedloraError(
            f"model '{name}' needs sides that are multiples of {row.multiple} and at least {row.smallest}, "
            f"the images are {' x '.join(map(str, spatial))}"
        )
