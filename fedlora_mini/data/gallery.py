"""A row a site, its images with the outline of the mask, or the class: the look that comes before any training."""

from typing import TYPE_CHECKING

import numpy as np

from fedlora_mini.data.base import IGNORE, Dataset, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#ffffff")  # Okabe and Ito


def gallery(dataset: Dataset, per_site: int = 4) -> "Figure":
    """`per_site` training images of every site, those with foreground first, and a legend of the classes."""
    from matplotlib.lines import Line2D

    from fedlora_mini.picture import Picture

    sites = [*dataset.sites, *dataset.unseen]
    figure = Picture(figsize=(1.7 * per_site + 1.9, 1.75 * len(sites) + 0.6), layout="constrained")
    axes = figure.subplots(len(sites), per_site, squeeze=False)
    for row, site in zip(axes, sites, strict=True):
        chosen = _choose(site, per_site)
        for column, axis in enumerate(row):
            axis.set_axis_off()
            if column < len(chosen):
                _show(axis, site, chosen[column], len(dataset.classes))
        sizes = "/".join(str(n) for n in site.sizes().values())
        role = "\nunseen" if site in dataset.unseen else ""
        label = f"{site.name}\n{sizes}{role}"
        row[0].text(-0.06, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    if dataset.task == "segmentation":
        handles = [Line2D([], [], color=_colour(c), lw=2, label=n) for c, n in enumerate(dataset.classes) if c > 0]
        ncols = min(len(handles), 6)
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    figure.suptitle(f"{dataset.name}: images in train/validation/test", fontsize=10)
    return figure


def _colour(label: int) -> str:
    return COLOURS[(label - 1) % len(COLOURS)]


def _choose(site: Site, count: int) -> list[int]:
    """Evenly spaced training images, among those with foreground where there are enough."""
    masks = site.train.masks
    masks = masks.view(-1, 1) if site.train.labelled else masks
    full = ((masks > 0) & (masks != IGNORE)).flatten(1).any(1).nonzero().flatten().tolist()
    pool = full if len(full) >= count else list(range(len(masks)))
    return [pool[i] for i in np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(int)]


def _show(axis: "Axes", site: Site, index: int, classes: int) -> None:
    image, mask = site.train.images[index], site.train.masks[index]
    if image.ndim == 4:  # a volume: its middle slice
        image, mask = image[..., image.shape[-1] // 2], mask[..., mask.shape[-1] // 2]
    picture = image.permute(1, 2, 0).numpy()
    axis.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
    if site.train.labelled:
        axis.set_title(f"class {int(mask)}", fontsize=9)
        return
    for label in range(1, classes):
        if bool((mask == label).any()):
            axis.contour((mask == label).numpy(), levels=[0.5], colors=[_colour(label)], linewidths=1.1)
