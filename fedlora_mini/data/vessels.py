"""Retinal vessels from two real sources as two sites: CHASE_DB1 (28 images of 14 children) and HRF (42 images).

Preparation: every image scaled to fit 256 px, centred on black, with one mask. Vessels are 1 to 3 px wide there, so a
smaller `size` cuts tiles. Shrinking instead (`patch=False`) averages areas and calls a pixel vessel from a share of 0.3
on. At 64 px that moves the foreground from 7.7 to 11.2 % (CHASE) and from 5.9 to 7.9 % (HRF), a shift of its own; even
a perfect answer, enlarged again, has Dice 0.63 and 0.48 with the 256 px masks; and a UNet after 300 steps (two seeds)
reaches 0.42 and 0.36 on whole test images where tiles give 0.70 and 0.69. At 256 px nothing is cut or shrunk.
Two files are understood: a packing of the prepared arrays, known by its sha256, and GitHub's zip of the repository at
URL, known by the commit id in its comment. Tested: the packing, and a zip written by the tests; not the repository's
own zip. The 256 px masks of the latter are made here, by the same 0.3, and need not equal the packing's.
Source: CHASE_DB1, Fraz et al., IEEE TBME 59:2538 (2012), doi 10.1109/TBME.2012.2205687; HRF, Budai et al., Int. J.
Biomedical Imaging 2013:154860, doi 10.1155/2013/154860; CC BY 4.0 by their data-set cards.
"""

import io
import os
import re
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from fedlora_mini.data.base import Dataset, Site, Split, check_size
from fedlora_mini.data.fetch import expect_commit, home, mirror, obtain_packed, safe_name, sha256
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import split_groups
from fedlora_mini.data.store import load_npz, pack, save_npz, unpack
from fedlora_mini.errors import FedloraError

COMMIT = "5ed22734"
URL = f"https://github.com/PhamDuy204/Retinal-vessels-segmentation/archive/{COMMIT}.zip"
ARCHIVE = "vessels/vessels256_ccby.npz"  # the packing
REPOSITORY = f"vessels/Retinal-vessels-segmentation-{COMMIT}.zip"
FILE_SHA256 = "16402d9b7eac02dcd19c120d782e51517aac715fcc48922ee1d11cb96efbc9cc"

SIDE = 256
SITES = ("CHASE", "HRF")
FILE = re.compile(r"(Image_\d\d[LR]|\d\d_(?:dr|g|h))(_1stHO)?\.((?i:jpg|png|tif|gif))")  # 1stHO: the first observer
VESSEL_SHARE = 0.3  # at 64 px the share with the largest overlap, on the mean of the sites, of 0.2 to 0.5
RETINA = 20  # brightest channel, of 255, above which a pixel shows retina; the surroundings are 0
LEAST_RETINA = 0.25  # of a tile; at 64 px every image gives 12, with 94 % (CHASE) and all (HRF) of the vessel pixels
NOTE = (
    "Real images of two sources, taken with different cameras and fields of view, and drawn by different people. Split "
    "by person: CHASE names its 14 children; HRF does not say whose an eye is, but neighbours in its numbering show a "
    "right and a left eye of the same colours, so they are taken for one person and share a split."
)
LICENCE = "CC BY 4.0 (CHASE_DB1 and HRF)"


def site_of(name: str) -> str:
    return "CHASE" if name.startswith("Image_") else "HRF"


def person(name: str) -> str:
    """Image_07L, Image_07R -> one child. HRF 2k-1 and 2k of a diagnosis -> one person; from 10_dr on, 2k and 2k+1."""
    if site_of(name) == "CHASE":
        return name[:-1]
    number, diagnosis = int(name[:2]), name[3:]
    shift = diagnosis == "dr" and number > 8  # 08_dr and 09_dr are both right eyes, 09_dr stands alone
    return f"{diagnosis}{(number + 1 + shift) // 2}"


def verify(path: Path) -> None:
    """Accepts the packing by its sha256, or the repository's zip by its commit."""
    expect_commit(FILE_SHA256, COMMIT)(path)


def fetch(source: str | os.PathLike[str] | None = None) -> Path:
    """The verified packing (7 MB) from `source`, cache or local copy, else the whole repository's zip from its home."""
    return obtain_packed(ARCHIVE, REPOSITORY, URL, verify, source)


def prepared(size: int) -> Path:
    """One file serves every size: smaller ones are made of its 256 px images when they are loaded."""
    check_size("vessels", size, SIDE)
    return home() / "vessels" / f"images{SIDE}.npz"


def prepare(source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """The images at 256 px as one npz in the cache; returns its path."""
    target = prepared(size)  # a size that cannot be had is refused before anything is downloaded
    path = fetch(source)
    packed = sha256(path) == FILE_SHA256
    arrays = read_packing(path) if packed else read_repository(path)
    return save_npz(target, **arrays, made_from="packing" if packed else "repository")


def read_packing(path: Path) -> dict[str, np.ndarray]:
    """images (N, 256, 256, 3) uint8, mask_bits (N, 8192), names (N,).

    The packing's `group` is a child for CHASE but a diagnosis for HRF, and its `split` is the repository's: not used.
    """
    data = load_npz(path)
    names = np.array([PurePosixPath(name).stem for name in data["name"].tolist()])
    return {"images": data["image"], "mask_bits": data["mask_bits"], "names": names}


def read_repository(path: Path) -> dict[str, np.ndarray]:
    """The same arrays from the originals, which are told by their file names, whatever their folders."""
    from tqdm import tqdm

    found: dict[str, dict[str, zipfile.ZipInfo]] = defaultdict(dict)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            match = FILE.fullmatch(PurePosixPath(safe_name(info.filename)).name)
            if match:
                role = "image" if match[3].lower() == "jpg" else "mask"
                if role in found[match[1]]:
                    raise FedloraError(f"{path.name} holds two files for the {role} of {match[1]}")
                found[match[1]][role] = info
        lone = sorted(name for name, pair in found.items() if len(pair) < 2)
        if lone or {site_of(name) for name in found} != set(SITES):
            raise FedloraError(f"{path.name} lacks image or mask of {', '.join(lone) or ' or '.join(SITES)}")
        names = sorted(found, key=lambda name: (site_of(name), name))
        images, masks = [], []
        for name in tqdm(names, desc="preparing vessels", leave=False, delay=1, disable=None):
            image = _read(archive, found[name]["image"], "RGB")  # (H, W, 3)
            mask = _read(archive, found[name]["mask"], "L") > 127
            if mask.shape != image.shape[:2]:
                raise FedloraError(f"image and mask of {name} differ in size: {image.shape[:2]} and {mask.shape}")
            height, width = (max(1, round(side * SIDE / max(mask.shape))) for side in mask.shape)
            images.append(_centre(shrink_image(image, height, width)))
            masks.append(_centre(shrink_mask(mask, height, width)))
    return {"images": np.stack(images), "mask_bits": pack(np.stack(masks)), "names": np.array(names)}


def shrink_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area average (PIL's box filter): uint8 (H, W, 3) -> (height, width, 3)."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def shrink_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) -> bool (height, width): vessel where it covers at least VESSEL_SHARE of a pixel's area."""
    from PIL import Image

    share = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(share) >= VESSEL_SHARE


def choose_tiles(image: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Top-left corners of the tiles over the retina that show enough of it: the image decides, not the mask."""
    retina = image.max(2) > RETINA
    tops, lefts = (_starts(np.flatnonzero(retina.any(axis)), size) for axis in (1, 0))
    return [(t, l) for t in tops for l in lefts if retina[t : t + size, l : l + size].mean() >= LEAST_RETINA]


def _starts(shown: np.ndarray, size: int) -> list[int]:
    """Where the tiles of a row begin: as many as cover the shown pixels, if they fit, centred on them."""
    if len(shown) == 0:
        return []
    first, behind = int(shown[0]), int(shown[-1]) + 1
    count = min(-(-(behind - first) // size), SIDE // size)
    start = min(max((first + behind - count * size) // 2, 0), SIDE - count * size)
    return [start + size * k for k in range(count)]


def ready(size: int = 64) -> bool:
    """Whether `load_vessels(size)` works without a download."""
    return prepared(size).is_file() or any((home() / a).is_file() or mirror(a) for a in (ARCHIVE, REPOSITORY))


def load_vessels(size: int = 64, seed: int = 0, *, patch: bool = True, test_seed: int | None = None) -> Dataset:
    """Two sites, split 70/15/15 by `person`, the same images in a split at every size.

    patch: tiles of `size` cut from the 256 px images, all of one in one split; False: whole images shrunk to `size`.
    The record holds the foreground share of the 256 px masks and of what was made of them. Prepares from a local
    archive if there is one; never downloads. test_seed: see `split_draws`.
    """
    path = prepared(size)
    if not path.is_file():
        if not ready(size):
            raise FedloraError(
                "'vessels' is not on this machine yet: run `fedlora data fetch vessels` (a whole repository), or "
                f"`python data_scripts/vessels.py --from PATH_OR_URL` if you have its zip or {Path(ARCHIVE).name}"
            )
        prepare(size=size)
    data = load_npz(path)
    images, masks, names = data["images"], unpack(data["mask_bits"], SIDE, SIDE), data["names"].tolist()

    def split(rows: list[int]) -> Split:
        if patch:
            cuts = [(i, *corner) for i in rows for corner in choose_tiles(images[i], size)]
            looks = [images[i, t : t + size, l : l + size] for i, t, l in cuts]
            drawn = [masks[i, t : t + size, l : l + size] for i, t, l in cuts]
        else:
            looks = [shrink_image(images[i], size, size) for i in rows]
            drawn = [shrink_mask(masks[i], size, size).astype(np.uint8) for i in rows]
        return Split(torch.from_numpy(np.stack(looks)).movedim(3, 1).float() / 255, torch.from_numpy(np.stack(drawn)))

    sites = []
    for number, site in enumerate(SITES):
        own = [i for i, name in enumerate(names) if site_of(name) == site]
        parts = split_groups([person(names[i]) for i in own], *split_draws(seed, number, test_seed=test_seed))
        rows = [[own[i] for i in part] for part in parts]
        train, val, test = (split(part) for part in rows)
        record: dict[str, Any] = {
            "origin": "real",
            "images": len(own),
            "people": len({person(names[i]) for i in own}),
            "image_ids": {
                part: [names[i] for i in chosen] for part, chosen in zip(("train", "val", "test"), rows, strict=True)
            },
            "patch": patch,
            "foreground_at_256": float(masks[own].mean()),
            "foreground": float(Split.concat([train, val, test]).masks.float().mean()),
            "made_from": str(data["made_from"]),
        }
        sites.append(Site(site, train, val, test, record))
    return Dataset("vessels", tuple(sites), ("background", "vessel"), note=NOTE, licence=LICENCE)


def _centre(image: np.ndarray) -> np.ndarray:
    """(h, w[, 3]) in the middle of SIDE x SIDE zeros."""
    pads = [((SIDE - side) // 2, (SIDE - side + 1) // 2) for side in image.shape[:2]]
    return np.pad(image, [*pads, *[(0, 0)] * (image.ndim - 2)])


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, mode: str) -> np.ndarray:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(archive.read(info))).convert(mode))
    except (OSError, zipfile.BadZipFile) as error:
        raise FedloraError(f"{info.filename} cannot be read: {error}") from error
