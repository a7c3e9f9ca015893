"""`check(path)`: every problem of a reader's own data in one list before anything trains, and a summary by site."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_mini.data.decode import read_pair
from fedlora_mini.data.layout import Layout, open_layout
from fedlora_mini.errors import FedloraError

LEAST = 3  # images of a site: one to train, one to validate, one to test
Visit = Callable[[str, str, np.ndarray, np.ndarray], None]  # site, stem, slices (S, H, W, 3), labels (S, H, W)


@dataclass(frozen=True)
class Report:
    """`problems`: one line each. `sites`: counts, sizes, label values and share of empty masks of what is readable.

    warnings: what trains, but perhaps not as it is meant.
    """

    path: str
    problems: tuple[str, ...]
    sites: dict[str, dict[str, Any]]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.sites)} sites, {_count(len(self.problems), 'problem')}"]
        for name, site in self.sites.items():
            slices = f" ({site['slices']} slices)" if site["slices"] != site["images"] else ""
            sizes = ", ".join(site["sizes"][:3]) + (
                f" and {len(site['sizes']) - 3} more" if len(site["sizes"]) > 3 else ""
            )
            lines.append(
                f"  {name}: {_count(site['images'], 'image')}{slices}, size {sizes or 'none'}, "
                f"labels {site['labels']}, empty masks {site['empty_share']:.0%}"
            )
        return "\n".join([*lines, *(f"  - {p}" for p in self.problems), *(f"  warning: {w}" for w in self.warnings)])


def check(path: str | Path) -> Report:
    """Reads every file under `path` (a folder or a zip) and lists every problem; never raises for bad data."""
    try:
        layout = open_layout(path)
    except (FedloraError, OSError) as error:
        return Report(str(path), (str(error),), {})
    try:
        return examine(layout, progress=True)
    finally:
        layout.close()


def examine(layout: Layout, visit: Visit | None = None, progress: bool = False) -> Report:
    """The report; `visit` is handed every readable pair on the way, so that loading reads each file once."""
    from tqdm import tqdm

    problems = list(layout.problems)
    sites: dict[str, dict[str, Any]] = {}
    total = sum(len(pairs) for pairs in layout.sites.values())
    with tqdm(
        total=total, desc=f"reading {layout.root.name}", leave=False, delay=1, disable=None if progress else True
    ) as bar:
        for site, pairs in layout.sites.items():
            seen = {"images": 0, "slices": 0, "empty": 0}
            sizes: set[tuple[int, int]] = set()
            labels: set[int] = set()
            for stem, (image_name, mask_name) in pairs.items():
                bar.update()
                try:
                    slices, masks = read_pair(image_name, layout.read(image_name), mask_name, layout.read(mask_name))
                except FedloraError as error:
                    problems.append(str(error))
                    continue
                except Exception as error:  # a damaged archive member, a decoder's own error: still one line
                    problems.append(f"{image_name}: image or mask cannot be read ({type(error).__name__}: {error})")
                    continue
                seen["images"] += 1
                seen["slices"] += len(slices)
                seen["empty"] += int((~masks.reshape(len(masks), -1).any(1)).sum())
                sizes.add((masks.shape[1], masks.shape[2]))
                labels.update(int(v) for v in np.unique(masks))
                if visit is not None:
                    visit(site, stem, slices, masks)
            if pairs and not seen["images"]:
                problems.append(f"site '{site}' is empty: none of its images can be read")
            elif pairs and not labels - {0}:
                problems.append(f"site '{site}': no mask has any foreground")
            if 0 < seen["images"] < LEAST:
                count = _count(seen["images"], "image")
                problems.append(f"site '{site}' has {count}: three splits need at least {LEAST}")
            sites[site] = {
                "images": seen["images"],
                "slices": seen["slices"],
                "sizes": [f"{h}x{w}" for h, w in sorted(sizes)],
                "labels": sorted(labels),
                "empty_share": seen["empty"] / max(seen["slices"], 1),
            }
    return Report(str(layout.root), tuple(problems), sites, _unlike(sites))


def _unlike(sites: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """A line where sites hold other labels than others; 0/1 here and 0/255 there are the same."""
    found = {site: set(summary["labels"]) - {0} for site, summary in sites.items()}
    values = [labels for labels in found.values() if labels]
    if all(labels == values[0] for labels in values) or all(labels in ({1}, {255}) for labels in values):
        return ()
    told = "; ".join(f"{site} {', '.join(map(str, sorted(labels)))}" for site, labels in found.items() if labels)
    return (f"sites differ in their labels, and every value is a class of its own: {told}",)


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")
