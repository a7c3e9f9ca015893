"""Shift statistics: how far apart two sites are before anything is trained, in intensity and in annotation."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora_mini.data.base import IGNORE, Dataset, Split

if TYPE_CHECKING:
    import pandas as pd


def describe(split: Split) -> dict[str, float]:
    """Intensity mean and std, foreground share, empty share, objects an image and their mean area in pixels.

    An object is a connected component of one class (faces touch). IGNORE counts neither as object nor as pixel. Where
    an image has one label: how many classes there are, and the share of the largest.
    """
    from scipy.ndimage import label

    masks = split.masks.numpy()
    if split.labelled:
        count = np.bincount(masks)
        return {
            "images": float(len(split)),
            "intensity_mean": float(split.images.mean()),
            "intensity_std": float(split.images.std()),
            "classes": float((count > 0).sum()),
            "largest_class": float(count.max() / count.sum()),
        }
    judged = masks != IGNORE
    objects, area = 0, 0
    for mask in masks:
        for value in np.unique(mask):
            if value not in (0, IGNORE):
                objects += label(mask == value)[1]
                area += int((mask == value).sum())
    foreground = (masks > 0) & judged
    empty = ~foreground.reshape(len(masks), -1).any(1)
    return {
        "images": float(len(split)),
        "intensity_mean": float(split.images.mean()),
        "intensity_std": float(split.images.std()),
        "foreground_share": float(foreground.sum() / max(judged.sum(), 1)),
        "empty_share": float(empty.mean()) if len(masks) else 0.0,
        "objects_per_image": objects / max(len(masks), 1),
        "object_area_mean": area / max(objects, 1),
    }


def shift_table(dataset: Dataset) -> "pd.DataFrame":
    """One row a site: its role and split sizes, then `describe` of its training split."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for role, sites in (("trains", dataset.sites), ("unseen", dataset.unseen)):
        for site in sites:
            stats = describe(site.train)
            stats.pop("images")
            rows.append({"site": site.name, "role": role, **site.sizes(), **stats})
    return pd.DataFrame(rows).set_index("site")
