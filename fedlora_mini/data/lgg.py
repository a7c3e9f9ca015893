"""Low-grade glioma: FLAIR slices with the tumour's outline from five institutions; DU, HT, FG, CS, and EZ unseen.

Preparation: of every patient the slices whose mask is not empty, in the order of their file names as text (slice 10
before 9); the middle channel (FLAIR) halved to 128 pixels by PIL's bilinear filter, grey values as they are; of the
mask every second pixel of every second row, the odd ones. From nine raw patients this makes, bit for bit, what a
prepared file of all 110 holds of them. A `size` below 128 averages by area; a pixel is tumour where at least half of it
is, which at 64 adds 6 % of area. Split by patient, never by slice.
Source: Buda, Saha and Mazurowski, Computers in Biology and Medicine 109:218 (2019), doi
10.1016/j.compbiomed.2019.05.002; Kaggle data set `kaggle_3m`, from TCIA's TCGA-LGG; CC BY-NC-SA 4.0.
"""

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlora_mini.data.base import Dataset, Site, Split, check_size
from fedlora_mini.data.fetch import home, members, mirror, names_digest, obtain, own_folder, sha256
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import split_groups
from fedlora_mini.data.store import load_npz, pack, save_npz, unpack
from fedlora_mini.errors import FedloraError

if TYPE_CHECKING:
    from PIL.Image import Resampling

PAGE = "https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation"
ARCHIVE = "lgg/lgg_flair128.npz"
FOLDER = "kaggle_3m"
# One prepared file is known by its sha256; every other one, and the raw slices, by what preparation makes of them.
FILE_SHA256 = "a76e82e470fe600a4f046687df3449bfe6e5f5d5fa052ce6389c2aaa5fff9637"
CONTENT_SHA256 = "62a5c12bd8034844114f7b168f02e1c09fb303969a89a169e8293488bbbfb4ba"

SIDE = 128
RAW = re.compile(r"TCGA_([A-Z]{2})_([A-Z0-9]{4})_\d{8}/TCGA_\1_\2_\d{8}_(\d+)(_mask)?\.tif")
INSTITUTIONS = {
    "DU": "Henry Ford Hospital",
    "HT": "Case Western, St. Joseph's",
    "FG": "Case Western",
    "CS": "Thomas Jefferson University",
    "EZ": "University of North Carolina",
}
UNSEEN = ("EZ",)
PARTS = ("train", "val", "test")
CLASSES = ("background", "tumour")
NOTE = (
    "Real MR slices; the sites are the institutions of TCGA's codes. Only slices with tumour are in it: a network "
    "never sees a healthy one. Split by patient. EZ is a single patient, its train and test are neighbouring slices of "
    "one tumour: judge there a model that never trained on it, and hold out another institution (unseen='CS') for more."
)
LICENCE = "CC BY-NC-SA 4.0 (Buda et al., kaggle_3m; TCIA TCGA-LGG): not for commercial use"


def verify(path: Path) -> None:
    """Accepts the known file, or anything from which preparation makes the known 1,373 slices of 110 patients."""
    if path.is_file() and sha256(path) == FILE_SHA256:
        return
    data = read_slices(path)
    found = slices_digest(data)
    if found != CONTENT_SHA256:
        people = len(set(data["patient"].tolist()))
        raise FedloraError(
            f"{path.name} is incomplete, corrupt or another version: {len(data['image']):,} slices of {people} "
            f"patients with content {found}; expected 1,373 of 110 with {CONTENT_SHA256}"
        )


def slices_digest(data: dict[str, np.ndarray]) -> str:
    """`names_digest` over `<site>/<patient>/<n>` of every slice: sha256 of its 128 x 128 grey bytes and mask bytes."""
    digests: dict[str, str] = {}
    count: Counter[str] = Counter()
    for image, mask, site, patient in zip(data["image"], data["mask"], data["site"], data["patient"], strict=True):
        owner = f"{site}/{patient}"
        digests[f"{owner}/{count[owner]}"] = hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()
        count[owner] += 1
    return names_digest(digests)


def read_slices(path: Path) -> dict[str, np.ndarray]:
    """image and mask (N, 128, 128) uint8, the mask 0/1, site (N,), patient (N,): from a prepared file or raw slices."""
    if path.is_dir():
        return read_raw({"/".join(p.parts[-2:]): p.read_bytes for p in path.rglob("*.tif")}, path.name)
    try:
        with zipfile.ZipFile(path) as archive:
            if "image.npy" not in archive.namelist():
                inside = members(archive, FOLDER)
                return read_raw({name: partial(archive.read, info) for name, info in inside.items()}, path.name)
    except (zipfile.BadZipFile, OSError, zlib.error) as error:
        raise FedloraError(f"{path.name} is neither a readable npz nor a readable zip: {error}") from error
    data = load_npz(path)
    if missing := {"image", "mask", "site", "patient"} - data.keys():
        raise FedloraError(f"{path.name} lacks {', '.join(sorted(missing))}")
    return {**data, "mask": np.unpackbits(data["mask"], axis=-1)}


def read_raw(files: dict[str, Callable[[], bytes]], source: str) -> dict[str, np.ndarray]:
    """The same from `TCGA_<site>_<patient>_<date>/..._<slice>.tif` and `..._<slice>_mask.tif`, name -> bytes."""
    from PIL.Image import Resampling
    from tqdm import tqdm

    pairs: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for name in files:
        if match := RAW.fullmatch(name):
            pairs[match[1], match[2], match[3]]["mask" if match[4] else "image"] = name
    images, masks, owners = [], [], []
    for owner in tqdm(sorted(pairs), desc=f"reading {source}", leave=False, delay=1, disable=None):
        if len(pairs[owner]) != 2:
            raise FedloraError(f"{source}: {next(iter(pairs[owner].values()))} has no twin: image and _mask are a pair")
        name = pairs[owner]["mask"]
        mask = _read(files[name](), name, "L")
        if mask.any():
            masks.append(_resize(mask, SIDE, Resampling.NEAREST) > 0)
            name = pairs[owner]["image"]
            image = _read(files[name](), name, "RGB")
            if image.shape[:2] != mask.shape:
                raise FedloraError(f"{source}: {name} and its mask differ in size: {image.shape[:2]} and {mask.shape}")
            images.append(_resize(image[..., 1], SIDE, Resampling.BILINEAR))
            owners.append(owner)
    if not images:
        raise FedloraError(f"{source} holds no tumour slice; expected {FOLDER}/TCGA_<site>_<patient>_<date>/*_mask.tif")
    return {
        "image": np.stack(images),
        "mask": np.stack(masks).astype(np.uint8),
        "site": np.array([site for site, _, _ in owners]),
        "patient": np.array([patient for _, patient, _ in owners]),
    }


def fetch(source: str | os.PathLike[str] | None = None) -> Path:
    """The verified file, archive or folder: `source`, else cache or local copy. Kaggle wants a login: no download."""
    if source is None and not (home() / ARCHIVE).is_file() and mirror(ARCHIVE) is None:
        raise FedloraError(
            f"'lgg' cannot be downloaded without an account at Kaggle: log in at {PAGE}, download the archive, and run "
            "`python data_scripts/lgg.py --from ARCHIVE_OR_FOLDER`"
        )
    if (folder := own_folder(ARCHIVE, source)) is not None:
        verify(folder)
        return folder
    return obtain(ARCHIVE, PAGE, verify, source)


def prepared(size: int) -> Path:
    check_size("lgg", size, 256)
    return home() / "lgg" / f"slices{size}.npz"


def prepare(source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """All slices at `size` pixels as one npz in the cache; returns its path."""
    from PIL.Image import Resampling

    target = prepared(size)  # a size that cannot be had is refused before anything is read
    data = read_slices(fetch(source))
    smooth = Resampling.BOX if size <= SIDE else Resampling.BILINEAR
    images = np.stack([_resize(image, size, smooth) for image in data["image"]])
    masks = np.stack([_resize(mask * 255, size, smooth) > 127 for mask in data["mask"]])
    return save_npz(target, images=images, mask_bits=pack(masks), site=data["site"], patient=data["patient"])


def ready(size: int = 64) -> bool:
    """Whether `load_lgg(size)` works with what is on this machine."""
    return prepared(size).is_file() or (home() / ARCHIVE).is_file() or mirror(ARCHIVE) is not None


def split_patients(patients: list[str], *draws: np.random.Generator) -> list[list[int]]:
    """[train, val, test] rows with every patient whole; a single patient's slices in halves, without validation."""
    if len(set(patients)) == 1:
        half = len(patients) // 2
        return [list(range(half)), [], list(range(half, len(patients)))]
    return split_groups(patients, *draws)


def load_lgg(size: int = 64, seed: int = 0, *, test_seed: int | None = None) -> Dataset:
    """Five institutions, split 70/15/15 by patient; the grey value thrice as channels. test_seed: `split_draws`."""
    path = prepared(size)
    if not path.is_file():
        if not ready(size):
            raise FedloraError(
                f"'lgg' at {size} pixels is not on this machine yet, and Kaggle gives it only to those who log in: "
                f"download {PAGE} and run `python data_scripts/lgg.py --from ARCHIVE_OR_FOLDER`"
            )
        prepare(size=size)
    data = load_npz(path)
    images = torch.from_numpy(data["images"])  # (N, H, W) uint8
    masks = torch.from_numpy(unpack(data["mask_bits"], size, size))
    sites = {}
    for number, (name, institution) in enumerate(INSTITUTIONS.items()):
        rows = np.flatnonzero(data["site"] == name)
        if len(rows) == 0:
            continue
        patients = data["patient"][rows].tolist()
        parts = split_patients(patients, *split_draws(seed, number, test_seed=test_seed))
        grey = [images[rows[part]].float() / 255 for part in parts]  # (n, H, W)
        train, val, test = splits = [
            Split(values[:, None].expand(-1, 3, -1, -1), masks[rows[part]])
            for values, part in zip(grey, parts, strict=True)
        ]
        record = {
            "origin": "real",
            "institution": institution,
            "slices": len(rows),
            # patient -> number of slices, in the order of the rows
            "patients": dict(zip(PARTS, (dict(Counter(patients[i] for i in part)) for part in parts), strict=True)),
            "empty_masks": dict(
                zip(PARTS, (int((split.masks.flatten(1).amax(1) == 0).sum()) for split in splits), strict=True)
            ),
        }
        sites[name] = Site(name, train, val, test, record)
    return Dataset(
        name="lgg",
        sites=tuple(s for name, s in sites.items() if name not in UNSEEN),
        unseen=tuple(s for name, s in sites.items() if name in UNSEEN),
        classes=CLASSES,
        note=NOTE,
        licence=LICENCE,
    )


def _read(data: bytes, name: str, mode: str) -> np.ndarray:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert(mode))
    except (OSError, SyntaxError) as error:
        raise FedloraError(f"{name} cannot be read: {error}") from error


def _resize(image: np.ndarray, size: int, method: "Resampling") -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), method))
