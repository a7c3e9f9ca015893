"""Medical Segmentation Decathlon, Task04: real MR volumes with the anterior and the posterior hippocampus; one source.

Preparation: axes in RAS order, each volume scaled from its 0.5th to its 99.5th percentile, centred in a box of
48 x 64 x 48 mm with zeros around it. Every volume (31..43 x 40..59 x 24..47 mm) fits whole, so the box costs no label
voxel. `size` is the longest side of the box in voxels: 64 keeps the 1 mm voxels; another size resamples the box, images
by area average (down) or linearly (up), labels by the largest share, a tie to the lower class. Below 64 the structures
lose volume: at 32, 7 % of the anterior and 12 % of the posterior part.
Source: Antonelli et al., Nature Communications 13:4128 (2022), doi 10.1038/s41467-022-30695-9; CC BY-SA 4.0.
"""

import gzip
import hashlib
import os
import re
import warnings
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.data.fetch import home, mirror, names_digest, obtain, sha256, tar_files
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import split_groups
from fedlora_mini.data.store import load_npz, save_npz
from fedlora_mini.errors import FedloraError

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
ARCHIVE = "hippocampus/task04_hippocampus.tar"
# The archive at URL is known by the md5 in monai.apps.datasets.DecathlonDataset (MONAI 1.6), another packing of the
# volumes by its sha256, and every further one by its voxels (`voxel_digest`, taken from that second packing).
PUBLIC_MD5 = "9d24dba78a72977dbd1d2e110310f31b"
FILE_SHA256 = "bbd681307162be40e9e6102edc243180dfd65726ce5969762501d9df97656fdd"
CONTENT_SHA256 = "01a682d9d9c598f36fddf948ba6d8c1c937a008f256712a56173f8d18eaeb855"

ROLES = {"imagesTr": "image", "images": "image", "labelsTr": "label", "labels": "label"}  # folder -> what it holds
CASE = re.compile(r"hippocampus_(\d+)\.nii\.gz")  # not the `._hippocampus_...` that macOS leaves in archives
BOX = (48, 64, 48)  # mm, left to right, back to front, bottom to top
PERCENTILES = (0.5, 99.5)
CLASSES = ("background", "anterior", "posterior")
NOTE = (
    "Real MR volumes of one source: there are no hospitals in this set, so it is one site. Each volume shows one "
    "hippocampus; left and right are not told apart, and all volumes have the same handedness, as if one side had been "
    "mirrored. The set does not say whose volume it is, but cases 2k-1 and 2k have nearly the same intensities, as two "
    "hippocampi of one person would: they share a split."
)
LICENCE = "CC BY-SA 4.0 (Medical Segmentation Decathlon, Task04)"


def verify(path: Path) -> None:
    """Accepts the two known archives by their digests, any other one if its complete cases have the known voxels."""
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 == PUBLIC_MD5 or sha256(path) == FILE_SHA256:
        return
    found = voxel_digest(path)
    if found != CONTENT_SHA256:
        raise FedloraError(f"{path.name} is corrupt or another version: voxels {found}, expected {CONTENT_SHA256}")


def voxel_digest(path: Path) -> str:
    """`names_digest` over `<case>/image` and `<case>/label` of the complete cases, whatever the packing.

    A volume's digest is the sha256 of its shape, written as "35 51 35 ", and of its voxels in RAS order, last axis
    fastest: images as little-endian float32, labels as uint8. Folder, compression, header and storage type don't count.
    """
    digests = {}
    for case, (image, label) in read_cases(path)[0].items():
        for role, volume, kind in (("image", image, "<f4"), ("label", label, "u1")):
            shape = "".join(f"{side} " for side in volume.shape)
            digests[f"{case}/{role}"] = hashlib.sha256(shape.encode() + volume.astype(kind).tobytes()).hexdigest()
    return names_digest(digests)


def read_cases(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """{"001": (image (X, Y, Z) float32, label (X, Y, Z) uint8)} in RAS order, and a line for every incomplete case."""
    files: dict[str, dict[str, tuple[str, bytes]]] = defaultdict(dict)
    for name, data in tar_files(path, ".nii.gz"):
        place = PurePosixPath(name)
        role, match = ROLES.get(place.parent.name), CASE.fullmatch(place.name)
        if role and match:
            if role in files[match[1]]:
                raise FedloraError(f"{path.name} holds two files for the {role} of case {match[1]}")
            files[match[1]][role] = name, data
    if not files:
        raise FedloraError(f"{path.name} holds no hippocampus_*.nii.gz in a folder called {', '.join(ROLES)}")
    cases, lone = {}, []
    for case in sorted(files):
        if len(files[case]) == 2:
            cases[case] = _pair(files[case]["image"], files[case]["label"])
        else:
            lone.append(f"case {case}: its {'label' if 'image' in files[case] else 'image'} is missing")
    return cases, lone


def _pair(image: tuple[str, bytes], label: tuple[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    values, mask = (_volume(*file) for file in (image, label))
    if values.shape != mask.shape:
        raise FedloraError(f"{image[0]} and {label[0]} differ in size: {values.shape} and {mask.shape}")
    found = np.unique(mask).tolist()
    if not set(found) <= set(range(len(CLASSES))):
        raise FedloraError(f"{label[0]} holds the labels {found}; accepted: 0, 1, 2")
    return values.astype(np.float32), mask.astype(np.uint8)


def _volume(name: str, data: bytes) -> np.ndarray:
    import nibabel

    broken = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        file = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(gzip.decompress(data)))
        values = np.asarray(file.dataobj)
    except (*broken, OSError, EOFError, ValueError, zlib.error) as error:
        raise FedloraError(f"{name} cannot be read: {error}") from error
    spacing = tuple(float(side) for side in file.header.get_zooms())
    if values.ndim != 3 or not np.allclose(spacing, 1) or not np.isfinite(values).all():
        raise FedloraError(f"{name}: {values.shape} voxels of {spacing} mm; expected a finite volume of 1 mm voxels")
    return values


def box(size: int) -> tuple[int, ...]:
    """Sides of the prepared volumes in voxels: BOX with its longest side `size` long, in the same proportions."""
    if size < 8 or size % 4:
        raise FedloraError(f"'hippocampus' has no size {size}; accepted: multiples of 4 from 8 on (sides 3 : 4 : 3)")
    return tuple(side * size // max(BOX) for side in BOX)


def centre(volume: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """The middle of a volume, cut or padded with zeros to `sides`, axis by axis."""
    cuts = [max(have - want, 0) for have, want in zip(volume.shape, sides, strict=True)]
    pads = [max(want - have, 0) for have, want in zip(volume.shape, sides, strict=True)]
    inner = volume[tuple(slice(cut // 2, cut // 2 + want) for cut, want in zip(cuts, sides, strict=True))]
    return np.pad(inner, [(pad // 2, pad - pad // 2) for pad in pads])


def resample(volumes: Tensor, sides: tuple[int, ...]) -> Tensor:
    """float (N, C, X, Y, Z) -> (N, C, *sides): area average down, linear up."""
    if tuple(volumes.shape[2:]) == sides:
        return volumes
    if sides[0] < volumes.shape[2]:
        return F.interpolate(volumes, size=sides, mode="area")
    return F.interpolate(volumes, size=sides, mode="trilinear")


def scale(image: np.ndarray) -> np.ndarray:
    """(x - p0.5) / (p99.5 - p0.5), clipped to [0, 1]: the stored intensities differ by a factor of 10,000."""
    low, high = np.percentile(image, PERCENTILES)
    return ((image - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


def prepare_volumes(path: Path, size: int) -> dict[str, np.ndarray]:
    """images and masks (N, *box(size)) uint8, and of every case its number, native shape and label voxels lost."""
    from tqdm import tqdm

    sides = box(size)
    cases, skipped = read_cases(path)
    for line in skipped:
        warnings.warn(f"left out: {line}", stacklevel=2)
    images, masks, lost = [], [], []
    for image, label in tqdm(cases.values(), desc="preparing hippocampus", leave=False, delay=1, disable=None):
        kept = centre(label, BOX)
        lost.append(int((label > 0).sum() - (kept > 0).sum()))
        grey = resample(torch.from_numpy(centre(scale(image), BOX))[None, None], sides)[0, 0]
        shares = F.one_hot(torch.from_numpy(kept).long(), len(CLASSES)).movedim(-1, 0).float()  # (3, X, Y, Z)
        images.append((grey * 255).round().to(torch.uint8).numpy())
        masks.append(resample(shares[None], sides)[0].argmax(0).to(torch.uint8).numpy())
    return {
        "images": np.stack(images),
        "masks": np.stack(masks),
        "cases": np.array(list(cases)),
        "shapes": np.array([label.shape for _, label in cases.values()], np.int16),
        "lost": np.array(lost, np.int32),
        "skipped": np.array(skipped, dtype=np.str_),
    }


def fetch(source: str | os.PathLike[str] | None = None) -> Path:
    """The verified archive (28 MB): `source`, else cache, local copy, or the public home."""
    return obtain(ARCHIVE, URL, verify, source)


def prepared(size: int) -> Path:
    return home() / "hippocampus" / f"volumes{size}.npz"


def prepare(source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """The volumes at `size` as one npz in the cache; returns its path. Warns of every case that is left out."""
    box(size)  # a size that cannot be had is refused before anything is downloaded
    return save_npz(prepared(size), **prepare_volumes(fetch(source), size))


def ready(size: int = 64) -> bool:
    """Whether `load_hippocampus(size)` works without a download."""
    return prepared(size).is_file() or (home() / ARCHIVE).is_file() or mirror(ARCHIVE) is not None


def person(case: str) -> str:
    """Cases 2k-1 and 2k share it, and so a split: their median intensities differ by 3 %, those of others twofold."""
    return str((int(case) + 1) // 2)


def load_hippocampus(size: int = 64, seed: int = 0, *, cube: bool = False, test_seed: int | None = None) -> Dataset:
    """One site, split 70/15/15 by `person`; images (N, 3, 3/4 size, size, 3/4 size), the grey values three times.

    cube: pad every side to `size` with zeros, for networks that want cubes (unetr3d at 32, swin_unetr3d at 64).
    test_seed: see `split_draws`. Prepares from a local archive if there is one; never downloads.
    """
    path = prepared(size)
    if not path.is_file():
        box(size)
        if not ready(size):
            raise FedloraError(
                f"'hippocampus' at size {size} is not on this machine yet: run `fedlora data fetch hippocampus` "
                "(28 MB), or `python data_scripts/hippocampus.py --from PATH_OR_URL` if you have the archive"
            )
        prepare(size=size)
    data = load_npz(path)
    images, masks = (torch.from_numpy(data[name]) for name in ("images", "masks"))  # (N, X, Y, Z) uint8
    if cube:
        pads = [part for side in reversed(box(size)) for part in ((size - side) // 2, (size - side + 1) // 2)]
        images, masks = F.pad(images, pads), F.pad(masks, pads)
    cases, skipped = data["cases"].tolist(), data["skipped"].tolist()
    parts = split_groups([person(case) for case in cases], *split_draws(seed, test_seed=test_seed))
    record = {
        "origin": "real",
        "voxel_mm": max(BOX) / size,
        "cases": {name: [cases[i] for i in part] for name, part in zip(("train", "val", "test"), parts, strict=True)},
        "skipped": skipped,
        "label_voxels_lost": int(data["lost"].sum()),
        "native_shapes": {"least": data["shapes"].min(0).tolist(), "most": data["shapes"].max(0).tolist()},
    }
    train, val, test = (Split((images[p].float() / 255)[:, None].expand(-1, 3, -1, -1, -1), masks[p]) for p in parts)
    return Dataset(
        name="hippocampus",
        sites=(Site("hippocampus", train, val, test, record),),
        classes=CLASSES,
        note=f"{NOTE} {len(skipped)} incomplete cases are left out: {'; '.join(skipped) or 'none'}.",
        licence=LICENCE,
    )
