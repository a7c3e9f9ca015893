"""LIDC-IDRI lung nodules with the outlines of four radiologists each: what supervision shift looks like in life.

One CT slice a nodule, 128 px around it, the grey values of every slice stretched to 0..255. Four readers drew each
nodule, but "rater 1" is not one person across scans: rater numbers are no clients, and the set is ONE site. `raters`
gives all four outlines, `agreement` measures how far they differ, `load_lidc` trains on one target made from them.
A smaller `size` averages areas; a mask keeps the pixels that it covers at least by half.
Among the packing's readers: Dice 0.83, outlines 0.77 px apart in the median (128 px), the largest area more than twice
the smallest in 15 % of the slices. Moving one outline evenly in or out would close a quarter of the gap: most is shape.
Two files are understood: a packing of 833 slices of 527 patients, known by its sha256, and GitHub's zip of the
repository at URL, known by the commit id in its comment. Tested: the packing, and a zip written by the tests in the
repository's layout; not the repository's own zip. From it, the slice of a nodule with the largest sum of the four areas
is taken; the packing's rule is not known, so that some slices may differ.
Source: Armato et al., Medical Physics 38:915 (2011), doi 10.1118/1.3528204; CC BY 3.0.
"""

import io
import os
import zipfile
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_mini.data.base import Dataset, Site, Split, check_size
from fedlora_mini.data.fetch import expect_commit, home, members, mirror, obtain_packed, sha256
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import natural, split_groups
from fedlora_mini.data.store import load_npz, pack, save_npz, unpack
from fedlora_mini.errors import FedloraError, unknown

COMMIT = "045c0c6b793191819d964d0f7862124731559d42"
URL = f"https://github.com/periclesanfe/Pulmoseg/archive/{COMMIT}.zip"
ARCHIVE = "lidc/lidc128_4raters.npz"  # the packing
REPOSITORY = f"lidc/Pulmoseg-{COMMIT[:8]}.zip"
FOLDER = "LIDC-IDRI-slices"
FILE_SHA256 = "253b7fe1b2340fff21a64e3b5b8893e1b0c5e18f576a91d1e0995fe2bbf4a6ba"

SIDE = 128
RATERS = 4
VOTES = {"union": 1, "majority": 2, "intersection": 4}  # readers of the four that a target's pixel needs
TARGETS = (*VOTES, *(f"rater{r}" for r in range(RATERS)))
NOTE = (
    "Real CT slices, one a nodule, with four readers' outlines of each. The readers have no names: the same number is "
    "another person in another scan, so they are no clients, and this is one site. Split by patient."
)
LICENCE = "CC BY 3.0 (LIDC-IDRI)"


def verify(path: Path) -> None:
    """Accepts the packing by its sha256, or the repository's zip by its commit."""
    expect_commit(FILE_SHA256, COMMIT)(path)


def fetch(source: str | os.PathLike[str] | None = None) -> Path:
    """The verified packing (10 MB) from `source`, cache or local copy, else the repository's zip from its home."""
    return obtain_packed(ARCHIVE, REPOSITORY, URL, verify, source)


def prepared(size: int) -> Path:
    return home() / "lidc" / f"slices{size}.npz"


def prepare(source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """Slices and outlines at `size` as one npz in the cache; returns its path."""
    check_size("lidc", size, SIDE)
    path = fetch(source)
    packed = sha256(path) == FILE_SHA256
    images, masks, names = read_packing(path) if packed else read_repository(path)
    images = np.stack([_shrink(image, size) for image in images])
    drawn = np.stack([_shrink(mask.astype(np.uint8) * 255, size) > 127 for four in masks for mask in four])
    origin = "packing" if packed else "repository"
    return save_npz(prepared(size), images=images, mask_bits=pack(drawn), names=np.array(names), made_from=origin)


def read_packing(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """images (N, 128, 128) uint8, masks (N, 4, 128, 128) uint8 0/1, names such as LIDC-IDRI-0003/nodule-1/5."""
    data = load_npz(path)
    bits = data["mask_bits"].reshape(-1, data["mask_bits"].shape[-1])  # (4 N, 2048)
    return data["image"], unpack(bits, SIDE, SIDE).reshape(-1, RATERS, SIDE, SIDE), data["name"].tolist()


def read_repository(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The same from <patient>/<nodule>/{images, mask-0 .. mask-3}/slice-<k>.png; only slices that all four drew on."""
    from tqdm import tqdm

    images, masks, names = [], [], []
    with zipfile.ZipFile(path) as archive:
        nodules: dict[str, dict[str, dict[str, zipfile.ZipInfo]]] = defaultdict(lambda: defaultdict(dict))
        for name, info in members(archive, FOLDER).items():
            parts = name.split("/")  # patient, nodule, role, slice
            if len(parts) == 4 and name.endswith(".png"):
                nodules["/".join(parts[:2])][parts[3]][parts[2]] = info
        for nodule in tqdm(sorted(nodules, key=natural), desc="preparing lidc", leave=False, delay=1, disable=None):
            best = None
            for name, files in sorted(nodules[nodule].items(), key=lambda item: natural(item[0])):
                roles = [f"mask-{r}" for r in range(RATERS)]
                if not {"images", *roles} <= set(files):
                    continue
                four = np.stack([_read(archive, files[role]) > 127 for role in roles])
                if four.any((1, 2)).all() and (best is None or four.sum() > best[0].sum()):
                    best = four, files["images"], name
            if best is not None:
                masks.append(best[0].astype(np.uint8))
                images.append(_read(archive, best[1]))
                names.append(f"{nodule}/{best[2].removeprefix('slice-').removesuffix('.png')}")
    if not names:
        raise FedloraError(f"{path.name} holds no slice below {FOLDER} that four readers drew on")
    return np.stack(images), np.stack(masks), names


def ready(size: int = 64) -> bool:
    """Whether `load_lidc(size)` works without a download."""
    return prepared(size).is_file() or any((home() / a).is_file() or mirror(a) for a in (ARCHIVE, REPOSITORY))


def raters(size: int = SIDE) -> tuple[Tensor, Tensor, list[str]]:
    """images (N, 1, size, size) in [0, 1], masks (N, 4, size, size) uint8 0/1, and the patient of every slice."""
    data = _stored(size)
    masks = unpack(data["mask_bits"], size, size).reshape(-1, RATERS, size, size)
    patients = [name.split("/")[0] for name in data["names"].tolist()]
    return torch.from_numpy(data["images"])[:, None].float() / 255, torch.from_numpy(masks), patients


def load_lidc(size: int = 64, seed: int = 0, *, target: str = "majority", test_seed: int | None = None) -> Dataset:
    """One site, split 70/15/15 by patient; images (N, 3, size, size), the grey values three times.

    target: "majority" (at least two of the four, the 50 % consensus usual for this set), "union", "intersection", or
    one reader of each slice, "rater0".."rater3". Prepares from a local archive if there is one; never
    downloads. test_seed: see `split_draws`.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    images, four, patients = raters(size)
    masks = (four.sum(1) >= VOTES[target]).to(torch.uint8) if target in VOTES else four[:, int(target[-1])]
    parts = split_groups(patients, *split_draws(seed, test_seed=test_seed))
    record = {
        "origin": "real",
        "target": target,
        "patients": {
            name: sorted({patients[i] for i in part})
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        },
        "empty_masks": int((masks.flatten(1).sum(1) == 0).sum()),
        "made_from": str(_stored(size)["made_from"]),
    }
    train, val, test = (Split(images[part].expand(-1, 3, -1, -1), masks[part]) for part in parts)
    site = Site("lidc", train, val, test, record)
    return Dataset("lidc", (site,), ("background", "nodule"), note=NOTE, licence=LICENCE)


def _stored(size: int) -> dict[str, np.ndarray]:
    """The prepared arrays; prepares them from a local archive if there is one, never downloads."""
    path = prepared(size)
    if not path.is_file():
        check_size("lidc", size, SIDE)
        if not ready(size):
            raise FedloraError(
                "'lidc' is not on this machine yet: run `fedlora data fetch lidc` (a whole repository), or "
                f"`python data_scripts/lidc.py --from PATH_OR_URL` if you have its zip or {Path(ARCHIVE).name}"
            )
        prepare(size=size)
    return load_npz(path)


def agreement(masks: Tensor) -> dict[str, Any]:
    """How far R outlines of the same N objects differ: masks (N, R, H, W) 0/1; P = R (R - 1) / 2 pairs of raters.

    dice (N, P), 1 if both are empty; dice_matrix (R, R), its mean over slices. distance (N, P): mean distance in pixels
    from the border pixels of either mask to the other's, nan if one is empty. area (R,): mean area of a rater over that
    of all. ratio (N,): largest area over smallest, inf if one is empty. twice: share of slices with a ratio above 2.
    """
    n, r = masks.shape[:2]
    flat = masks.flatten(2).float()
    area = flat.sum(2)  # (N, R)
    both, total = flat @ flat.mT, area[:, :, None] + area[:, None]  # (N, R, R)
    dice = torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)
    pairs = list(combinations(range(r), 2))
    first, second = zip(*pairs, strict=True)
    ratio = area.amax(1) / area.amin(1)  # inf if a mask is empty, nan if all are
    distance = torch.tensor([_border_distances(four, pairs) for four in masks.bool().numpy()]).reshape(n, len(pairs))
    return {
        "dice": dice[:, first, second],
        "dice_matrix": dice.mean(0),
        "distance": distance,
        "area": area.mean(0) / area.mean(),
        "ratio": ratio,
        "twice": float((ratio > 2).float().mean()),
    }


def _border_distances(masks: np.ndarray, pairs: list[tuple[int, int]]) -> list[float]:
    """Mean distance from the border pixels of either mask to the other's, for every pair; masks (R, H, W) bool."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    rows, columns = (np.flatnonzero(masks.any((0, axis))) for axis in (2, 1))
    if len(rows) == 0:
        return [float("nan")] * len(pairs)
    masks = masks[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # nothing lies outside
    borders = [mask & ~binary_erosion(mask) for mask in masks]  # pixels with a side neighbour outside
    away = [distance_transform_edt(~border) for border in borders]
    return [
        float(np.concatenate([away[j][borders[i]], away[i][borders[j]]]).mean())
        if borders[i].any() and borders[j].any()
        else float("nan")
        for i, j in pairs
    ]


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Area average (PIL's box filter): uint8 (128, 128) -> (size, size)."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    from PIL import Image

    try:
        image = np.asarray(Image.open(io.BytesIO(archive.read(info))).convert("L"))
    except (OSError, zipfile.BadZipFile) as error:
        raise FedloraError(f"{info.filename} cannot be read: {error}") from error
    if image.shape != (SIDE, SIDE):
        raise FedloraError(f"{info.filename} has {image.shape} pixels, expected {SIDE} x {SIDE}")
    return image
