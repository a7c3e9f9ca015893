"""Bytes of one image and of its mask -> uint8 slices (S, H, W, 3) and labels (S, H, W); every misfit is one clear line.

A flat image is one slice; a volume is cut along its last axis. Eight-bit values stay as they are; everything else is
scaled from the 0.5th to the 99.5th percentile of the image or volume (floats already in [0, 1] times 255).
"""

import io
import zipfile
import zlib

import numpy as np

from fedlora_mini.data.layout import split_extension
from fedlora_mini.errors import FedloraError

MOST_LABELS = 32  # more values than this is a grey picture, not a label mask


def read_pair(image_name: str, image: bytes, mask_name: str, mask: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(S, H, W, 3) uint8 and (S, H, W) uint8 with the labels as stored (0/255 stays 0/255)."""
    labels = _as_labels(_array(mask_name, mask, is_mask=True), mask_name)
    picture = _array(image_name, image, is_mask=False)
    flat = labels.ndim == 2 or (labels.ndim == 3 and labels.shape[2] == 1)
    if flat:
        labels = labels.reshape(*labels.shape[:2], 1)
        picture = picture.reshape(*picture.shape[:2], -1, *picture.shape[3:])
        if picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
            raise FedloraError(
                f"{image_name}: shape {_shape(picture)} is a volume, but its mask is flat {_shape(labels)}"
            )
        if picture.shape[:2] != labels.shape[:2]:
            raise FedloraError(f"{image_name}: image {_shape(picture)} and mask {_shape(labels)} differ in size")
        slices = _to_bytes(picture, image_name)[None, :, :, :3]  # (1, H, W, 1 or 3)
    else:
        if picture.shape != labels.shape:
            raise FedloraError(f"{image_name}: volume {_shape(picture)} and mask {_shape(labels)} differ in size")
        slices = _to_bytes(picture, image_name).transpose(2, 0, 1)[..., None]
    return np.broadcast_to(slices, (*slices.shape[:3], 3)), labels.transpose(2, 0, 1)


def _array(name: str, data: bytes, is_mask: bool) -> np.ndarray:
    """The file's values as stored: (H, W), (H, W, colours) or (H, W, D)."""
    extension = split_extension(name)[1]
    try:
        if extension == ".npy":
            values = np.load(io.BytesIO(data), allow_pickle=False)
        elif extension in (".nii", ".nii.gz"):
            values = _nifti(data)
        else:
            values = _picture(data, name, is_mask)
    except FedloraError:
        raise
    except (OSError, ValueError, EOFError, SyntaxError, zlib.error, zipfile.BadZipFile) as error:
        raise FedloraError(
            f"{name}: cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if values.ndim not in (2, 3) or 0 in values.shape or values.dtype.kind not in "buif":
        raise FedloraError(
            f"{name}: {values.dtype} of shape {_shape(values)} is neither a picture nor a volume of numbers"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise FedloraError(f"{name}: holds NaN or infinite values")
    return values


def _picture(data: bytes, name: str, is_mask: bool) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pages = getattr(picture, "n_frames", 1)
        if pages > 1:
            raise FedloraError(f"{name}: has {pages} pages; save a stack as .npy or .nii.gz")
        if picture.mode == "1":
            return np.asarray(picture)
        if is_mask and picture.mode not in ("L", "P", "I", "I;16", "F"):
            colours = np.asarray(picture.convert("RGB"))
            if (colours != colours[..., :1]).any():
                raise FedloraError(f"{name}: the mask is in colour; expected one number a pixel")
            grey = colours[..., 0]
        elif picture.mode in ("L", "I", "I;16", "F") or (is_mask and picture.mode == "P"):
            grey = np.asarray(picture)
        else:
            return np.asarray(picture.convert("RGB"))
        if is_mask and split_extension(name)[1] in (".jpg", ".jpeg"):  # JPEG smears 0/255: cut in the middle
            return np.where(grey >= 128, 255, 0).astype(np.uint8)
        return grey


def _nifti(data: bytes) -> np.ndarray:
    import gzip

    import nibabel

    raw = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    try:
        return np.asanyarray(nibabel.Nifti1Image.from_bytes(raw).dataobj)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ValueError(str(error)) from error


def _as_labels(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == bool:
        return values.astype(np.uint8)
    found = np.unique(values)
    if (found != np.round(found)).any() or found[0] < 0 or found[-1] > 255:
        raise FedloraError(f"{name}: mask values from {found[0]} to {found[-1]}; expected whole numbers from 0 to 255")
    if len(found) > MOST_LABELS:
        raise FedloraError(
            f"{name}: {len(found)} different values: a grey picture, not a label mask (0/255, 0/1 or labels)"
        )
    return values.astype(np.uint8)


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    values = values.astype(np.float32)
    if values.min() >= 0 and 0 < values.max() <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    return np.round((values - low) / max(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8)


def _shape(values: np.ndarray) -> str:
    return " x ".join(str(n) for n in values.shape)
