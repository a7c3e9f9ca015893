"""PolypGen: colonoscopy frames with polyp masks from six hospitals; C1 to C5 are sites, C6 is the unseen one.

Preparation: every frame squeezed to `size` x `size` by area average; a pixel is polyp where at least half of it is.
Splits: C1 by the examination number before "OLCV1" in the file name, C4 by the sequence number that leads it. The other
names carry no patient: three contiguous blocks. C2 is two series of the same patients in the same order, the second
(frame 1257 and on) under treatment; both are laid side by side before they are cut.

URL is a snapshot of a public repository that holds the 1,537 single frames as `.../images/<name>.jpg` and
`.../masks/<name>_mask.jpg`; a frame's hospital is read from its name. Tested is a packing of them at 256 pixels as
`<C1..C6>/{images/<name>.jpg,masks/<name>.png}`, a zip or a folder, and the `_mask` layout on files made from it. Not
tested: the snapshot itself, and the archive of Synapse (syn26376615), whose `data_C1/images_C1` would be read likewise.
Source: Ali et al., Scientific Data 10:75 (2023), doi 10.1038/s41597-023-01981-y; CC BY 4.0.
"""

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from fedlora_mini.data.base import Dataset, Site, Split, check_size
from fedlora_mini.data.fetch import home, mirror, names_digest, obtain, own_folder, safe_name, sha256
from fedlora_mini.data.layout import Layout
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import natural, split_groups, split_items
from fedlora_mini.data.store import load_npz, pack, save_npz, unpack
from fedlora_mini.errors import FedloraError

COMMIT = "b72808574340a94db3f547e36363872a9b525962"
URL = f"https://codeload.github.com/AlexMilionis/PolypSegmentation/zip/{COMMIT}"
ARCHIVE = "polypgen/polypgen256.zip"
# The 256-pixel packing is known by its sha256, or by the bytes of its files. The frames in their first size are known
# by their names: the bytes of a snapshot are not fixed, and its checksums protect the files inside.
FILE_SHA256 = "13da037217feaa51a44ac43843b574a6cf5c7f21b4d20b9e377c96f3600ac193"
CONTENT_SHA256 = "999d9b7cd6badd886b36ab5b096c0c03cfc14b66a7a9174770f71901f29b093d"
NAMES_SHA256 = "d4d471917d8382bea3fd6fb3612c0ca3ab0c98e2f25d34d943a347dfa3c3c197"

HOSPITALS = {"C1": "Paris", "C2": "Padova", "C3": "CRO, Italy", "C4": "Oslo", "C5": "Oxford", "C6": "Alexandria"}
UNSEEN = ("C6",)
NAMES = {
    "C1": r"(?:\d+OLCV1_)?100[HS]\d{4}",
    "C2": r"EndoCV2021_\d{6}",
    "C3": r"C3_EndoCV2021_\d+",
    "C4": r"\d+_endocv2021_(?:positive|negative)_\d+(?: 2)?",  # one name ends in "329 2"
    "C5": r"EndoCV2021_C5_\d+",
    "C6": r"EndoCV2021_C6_\d+",
}
GROUPS = {"C1": r"(\d+)OLCV1_", "C4": r"(\d+)_"}  # C1: an examination; C4: a sequence
NO_GROUP = "no number"  # three frames of C1 have no number: they stay together
# Frames of C2's second series and of its first that show one scene, found by eye; between them the order is linear.
SECOND_SERIES = (1260, 1284, 1306, 1321, 1337, 1340, 1346, 1374, 1387, 1420, 1431)
FIRST_SERIES = (1008, 1034, 1060, 1079, 1107, 1121, 1140, 1171, 1191, 1244, 1256)
SECOND_STARTS = 1257
PARTS = ("train", "val", "test")
CLASSES = ("background", "polyp")
NOTE = (
    "Real frames of six hospitals. C1 is split by examination and C4 by sequence, as far as the file names tell. The "
    "names of C2, C3, C5 and C6 carry no patient: blocks of neighbouring names keep most frames of a patient together, "
    "not surely all. Some of the last 19 frames of C6 show lesions of earlier ones: judge on C6, do not train there. "
    "Masks are empty where no polyp was outlined, in C4 for 81 of 227 frames, 80 of them called positive."
)
LICENCE = "CC BY 4.0 (PolypGen: Ali et al., Scientific Data 10:75, 2023, doi 10.1038/s41597-023-01981-y)"


def verify(path: Path) -> None:
    """Accepts the known archive, any packing of its files, or the frames in their first size with `_mask` names."""
    if path.is_file() and sha256(path) == FILE_SHA256:
        return
    with closing(open_files(path)) as files:
        frames = list_frames(files)
        found = names_digest({f"{site}/{stem}": "" for site, stems in frames.items() for stem in stems})
        if found != NAMES_SHA256:
            counts = ", ".join(f"{site} {len(stems)}" for site, stems in frames.items()) or "none"
            raise FedloraError(f"{path.name} is not PolypGen's 1,537 single frames; complete frames found: {counts}")
        digests, squeezed = {}, False
        for site, stems in frames.items():
            for stem, pair in stems.items():
                squeezed |= PurePosixPath(pair["mask"]).stem == stem
                for role, name in pair.items():
                    digests[f"{site}/{stem}/{role}"] = hashlib.sha256(_bytes(files, name)).hexdigest()
    content = names_digest(digests)
    if squeezed and content != CONTENT_SHA256:
        raise FedloraError(f"{path.name} is corrupt or another version: content {content}, expected {CONTENT_SHA256}")


def open_files(path: Path) -> Layout:
    """The folder or the zip archive, read in place."""
    if path.is_dir():
        return Layout(path, None)
    try:
        return Layout(path, zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError) as error:
        raise FedloraError(f"{path.name} is not a readable zip archive: {error}") from error


def list_frames(files: Layout) -> dict[str, dict[str, dict[str, str]]]:
    """{"C1": {"100H0050": {"image": file name, "mask": file name}}}, sorted; a frame without its mask is left out.

    A file in a folder called "...image..." or "...mask..." belongs to the hospital whose pattern its name fits. It may
    lie in several folders, if it is the same in all.
    """
    if files.archive:
        names = files.archive.namelist()
    else:
        names = [p.relative_to(files.root).as_posix() for p in files.root.rglob("*") if p.is_file()]
    found: dict[str, dict[str, dict[str, str]]] = {site: defaultdict(dict) for site in NAMES}
    for name in sorted(names):
        place = PurePosixPath(safe_name(name))
        role = next((role for role in ("mask", "image") if role in place.parent.name.lower()), None)
        if role is None or place.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        for site, pattern in NAMES.items():
            if match := re.fullmatch(rf"({pattern})_?(?:_mask)?", place.stem):
                first = found[site][match[1]].setdefault(role, name)
                if first != name and _bytes(files, first) != _bytes(files, name):
                    raise FedloraError(f"{files.root.name}: {first} and {name} differ, but are the same {role}")
    return {
        site: {stem: stems[stem] for stem in sorted(stems, key=natural) if len(stems[stem]) == 2}
        for site, stems in found.items()
        if stems
    }


def fetch(source: str | os.PathLike[str] | None = None) -> Path:
    """The verified archive or folder: `source`, else cache, local copy, or the public home."""
    if (folder := own_folder(ARCHIVE, source)) is not None:
        verify(folder)
        return folder
    return obtain(ARCHIVE, URL, verify, source)


def prepared(size: int) -> Path:
    check_size("polypgen", size, 256)
    return home() / "polypgen" / f"frames{size}.npz"


def prepare(source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """All frames at `size` pixels as one npz in the cache; returns its path."""
    return save_npz(prepared(size), **squeeze_frames(fetch(source), size))


def squeeze_frames(path: Path, size: int) -> dict[str, np.ndarray]:
    """images (N, size, size, 3) uint8, mask_bits (N, ...), site (N,) into sites, stems (N,): naturally sorted names."""
    from tqdm import tqdm

    images, masks, owner, stems = [], [], [], []
    with closing(open_files(path)) as files:
        frames = list_frames(files)
        rows = [(number, stem, pair) for number, site in enumerate(frames) for stem, pair in frames[site].items()]
        for number, stem, pair in tqdm(rows, desc="preparing polypgen", leave=False, delay=1, disable=None):
            images.append(_squeeze(_bytes(files, pair["image"]), pair["image"], "RGB", size))
            masks.append(_squeeze(_bytes(files, pair["mask"]), pair["mask"], "L", size) > 127)
            owner.append(number)
            stems.append(stem)
    return {
        "images": np.stack(images),
        "mask_bits": pack(np.stack(masks)),
        "site": np.array(owner, np.uint8),
        "sites": np.array(list(frames)),
        "stems": np.array(stems),
    }


def ready(size: int = 64) -> bool:
    """Whether `load_polypgen(size)` works without a download."""
    return prepared(size).is_file() or (home() / ARCHIVE).is_file() or mirror(ARCHIVE) is not None


def group_of(site: str, stem: str) -> str:
    """The examination (C1) or the sequence (C4) that a frame's name tells."""
    match = re.match(GROUPS[site], stem)
    return match[1] if match else NO_GROUP


def position(site: str, stem: str) -> tuple[float, list[tuple[int, int, str]]]:
    """Sort key of the sites that are cut into blocks: the name, in C2 where its patient stands in the first series."""
    number = int(stem.rsplit("_", 1)[1]) if site == "C2" else 0
    if number < SECOND_STARTS:
        return float(number), natural(stem)
    return float(np.interp(number, SECOND_SERIES, FIRST_SERIES)), natural(stem)


def split_frames(site: str, stems: list[str], *draws: np.random.Generator) -> list[list[int]]:
    """[train, val, test] rows of a hospital's frames: whole groups where names tell them, else contiguous blocks."""
    if site in GROUPS:
        return split_groups([group_of(site, stem) for stem in stems], *draws)
    order = sorted(range(len(stems)), key=lambda row: position(site, stems[row]))
    return [sorted(order[i] for i in part) for part in split_items(len(stems), *draws)]


def load_polypgen(size: int = 64, seed: int = 0, *, test_seed: int | None = None) -> Dataset:
    """Six hospitals, split 70/15/15. Prepares from a local archive if there is one; never downloads.

    test_seed: see `split_draws`.
    """
    path = prepared(size)
    if not path.is_file():
        if not ready(size):
            raise FedloraError(
                f"'polypgen' at {size} pixels is not on this machine yet: run `fedlora data fetch polypgen`, or "
                "`python data_scripts/polypgen.py --from PATH_OR_URL` if you have the frames"
            )
        prepare(size=size)
    data = load_npz(path)
    images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)  # (N, 3, H, W) uint8
    masks = torch.from_numpy(unpack(data["mask_bits"], size, size))
    sites = {}
    for number, name in enumerate(data["sites"].tolist()):
        rows = np.flatnonzero(data["site"] == number)
        stems = data["stems"][rows].tolist()
        parts = split_frames(name, stems, *split_draws(seed, number, test_seed=test_seed))
        train, val, test = splits = [Split(images[rows[p]].float() / 255, masks[rows[p]]) for p in parts]
        record: dict[str, Any] = {
            "origin": "real",
            "hospital": HOSPITALS[name],
            "frames": len(rows),
            "split": "by group" if name in GROUPS else "three blocks",
            "files": dict(
                zip(PARTS, ([stems[i] for i in part] for part in parts), strict=True)
            ),  # in the order of the rows
            "empty_masks": dict(
                zip(PARTS, (int((split.masks.flatten(1).amax(1) == 0).sum()) for split in splits), strict=True)
            ),
        }
        if name in GROUPS:
            record["groups"] = dict(
                zip(PARTS, (dict(Counter(group_of(name, stems[i]) for i in part)) for part in parts), strict=True)
            )
        sites[name] = Site(name, train, val, test, record)
    return Dataset(
        name="polypgen",
        sites=tuple(s for name, s in sites.items() if name not in UNSEEN),
        unseen=tuple(s for name, s in sites.items() if name in UNSEEN),
        classes=CLASSES,
        note=NOTE,
        licence=LICENCE,
    )


def _bytes(files: Layout, name: str) -> bytes:
    try:
        return files.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise FedloraError(f"{name} cannot be read: {error}") from error


def _squeeze(data: bytes, name: str, mode: str, size: int) -> np.ndarray:
    """Decoded to "RGB" or to a mask of 0 and 255 ("L"), then size x size: area average down, bilinear up."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data)).convert(mode)
    except (OSError, SyntaxError) as error:
        raise FedloraError(f"{name} cannot be read: {error}") from error
    if mode == "L":  # JPEG smears the edges of a mask: cut in the middle
        picture = Image.fromarray(np.where(np.asarray(picture) > 127, 255, 0).astype(np.uint8))
    smooth = Image.Resampling.BOX if min(picture.size) >= size else Image.Resampling.BILINEAR
    return np.asarray(picture.resize((size, size), smooth))
