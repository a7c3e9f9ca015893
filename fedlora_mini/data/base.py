"""What every data set is: sites, each with a train, validation and test split and a written record of its shift."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError

IGNORE = 255  # label value that no loss and no metric looks at


@dataclass(frozen=True, eq=False)  # tensors have no single truth value: compare by identity
class Split:
    """`images` (N, C, *spatial) float32 in [0, 1]; `masks` (N, *spatial) uint8, 0 = background, IGNORE = not judged.

    Or `masks` (N,): one label an image, and the task is to name its class.
    """

    images: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        for name, part in {"images": self.images, "masks": self.masks}.items():
            if not isinstance(part, Tensor):
                raise FedloraError(f"{name} are a torch.Tensor, got {type(part).__name__}; see torch.from_numpy")
        fits = self.masks.shape[1:] in (self.images.shape[2:], torch.Size())
        if self.images.shape[0] != self.masks.shape[0] or not fits:
            raise FedloraError(
                f"images {tuple(self.images.shape)} and masks {tuple(self.masks.shape)} do not fit: "
                "expected (N, C, *spatial) and (N, *spatial), or (N,) for one label an image"
            )

    @property
    def labelled(self) -> bool:
        """Whether an image has one label, instead of one a pixel."""
        return self.masks.dim() == 1

    def __len__(self) -> int:
        return self.images.shape[0]

    @staticmethod
    def concat(parts: "list[Split]") -> "Split":
        return Split(torch.cat([p.images for p in parts]), torch.cat([p.masks for p in parts]))


@dataclass(frozen=True, eq=False)
class Site:
    """One client's data. `record` says in plain values where it came from or which shift made it."""

    name: str
    train: Split
    val: Split
    test: Split
    record: dict[str, Any] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}

    def statistics(self) -> dict[str, float]:
        """Shift statistics of the training split: intensity mean and std, foreground share, objects' mean area."""
        from fedlora_mini.data.statistics import describe

        return describe(self.train)


@dataclass(frozen=True, eq=False)
class Dataset:
    """`sites` take part in training, `unseen` never do. `classes[0]` is the background, if pixels have the labels."""

    name: str
    sites: tuple[Site, ...]
    classes: tuple[str, ...]
    unseen: tuple[Site, ...] = ()
    note: str = ""  # what a reader must know: real or simulated, how it was split
    licence: str = ""

    @property
    def channels(self) -> int:
        return self.sites[0].train.images.shape[1]

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(self.sites[0].train.images.shape[2:])

    @property
    def task(self) -> str:
        """ "segmentation", or "classification" where an image has one label."""
        return "classification" if self.sites[0].train.labelled else "segmentation"

    @cached_property
    def digest(self) -> str:
        """Twelve digits of a sha256 over classes, the sites' names and every image and mask."""
        names = [(site.name, site in self.unseen) for site in (*self.sites, *self.unseen)]
        sha = hashlib.sha256(repr((self.classes, names)).encode())
        for site in (*self.sites, *self.unseen):
            for split in (site.train, site.val, site.test):
                sha.update(S.digest({"images": split.images, "masks": split.masks}).encode())
        return sha.hexdigest()[:12]

    def check(self, channels: int = 3) -> None:
        """Raise unless a network of so many channels can train on it and be scored at every site.

        One size, float32 in [0, 1], labels that are classes; a test split of masks has some foreground.
        """
        for site in (*self.sites, *self.unseen):
            for part, split in {"train": site.train, "val": site.val, "test": site.test}.items():
                where = f"site '{site.name}' of '{self.name}', {part}"
                _check_images(where, split.images, (channels, *self.spatial))
                _check_labels(where, split.masks, len(self.classes))
                if part == "test" and not split.labelled and not ((split.masks > 0) & (split.masks != IGNORE)).any():
                    hint = f"; {IGNORE} says that nobody is judged" if (split.masks == IGNORE).any() else ""
                    raise FedloraError(f"{where}: no mask has any foreground, so there is no score{hint}")

    def __post_init__(self) -> None:
        if not self.sites:
            raise FedloraError(f"data set '{self.name}' has no sites")
        names = [site.name for site in (*self.sites, *self.unseen)]
        for name in names:
            if names.count(name) > 1:
                raise FedloraError(f"data set '{self.name}' has two sites called '{name}'")
        for site in (*self.sites, *self.unseen):
            for part, size in site.sizes().items():
                if size == 0 and not (part == "val" and site in self.unseen):
                    raise FedloraError(f"site '{site.name}' of '{self.name}' has an empty {part} split")


def _check_images(where: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if not len(x):
        return
    wanted = f"an image is {shape} of torch.float32 in [0, 1]"
    if x.shape[1:] != shape or x.dtype != torch.float32:
        raise FedloraError(f"{where}: {wanted}, got {tuple(x.shape[1:])} of {x.dtype}")
    low, high = float(x.amin()), float(x.amax())
    if not (low >= 0 and high <= 1):  # nan is neither
        raise FedloraError(f"{where}: {wanted}, got numbers from {low:g} to {high:g}")


def _check_labels(where: str, y: Tensor, classes: int) -> None:
    if y.is_floating_point():
        raise FedloraError(f"{where}: labels are whole numbers, such as torch.uint8, got {y.dtype}")
    if len(odd := y[(y != IGNORE) & ((y < 0) | (y >= classes))]):
        told = f"labels are 0 to {classes - 1}, numbers of `classes`, or {IGNORE} where nobody is judged"
        raise FedloraError(f"{where}: {told}; got {int(odd[0])}")


def check_size(data: str, size: int, largest: int) -> None:
    """Raise unless images can be had at this size: one that cannot is refused before anything is downloaded."""
    if not 16 <= size <= largest or size % 8:
        raise FedloraError(f"'{data}' has no size {size}; accepted: multiples of 8 from 16 to {largest}")
