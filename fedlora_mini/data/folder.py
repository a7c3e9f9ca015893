"""Your own data: <root>/<site>/{images,masks}/<name>.{png,jpg,tif,nii.gz,npy}, a folder or a zip of it, read in place.

Splits never cut what belongs together. By default each site's naturally sorted names are cut into three contiguous
blocks, because neighbouring frames of a video are nearly the same picture. Where names carry the patient, say so:
group=r"^(\\d+)" takes the id from the name (the first bracket of the first match), for all sites or, as
{"C1": r"^(\\d+)"}, for some. A volume's slices always share a split.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora_mini.data.base import IGNORE, Dataset, Site, Split
from fedlora_mini.data.check import LEAST, Report, examine
from fedlora_mini.data.fetch import home
from fedlora_mini.data.layout import open_layout
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import GROUPINGS, split_groups, split_items
from fedlora_mini.data.store import load_npz, save_npz
from fedlora_mini.errors import FedloraError, unknown

FORMAT = 1  # part of the cache key: raise it when what is stored changes
KEPT = 8  # prepared folders kept in the cache
SLICES = ("foreground", "all")
Group = str | Mapping[str, str]


def load_folder(
    path: str | Path,
    size: int = 64,
    seed: int = 0,
    *,
    grouping: str = "contiguous",
    group: Group | None = None,
    slices: str = "foreground",
    ignore: int | None = None,
    skip_broken: bool = False,
    use_cache: bool = True,
    test_seed: int | None = None,
) -> Dataset:
    """A data set from a folder or zip; images squeezed to size x size, grey copied to three channels.

    grouping: "contiguous" or "random" for sites without `group`. slices: of a volume, those with foreground, or all.
    ignore: the stored label that nobody should be judged on. skip_broken: leave out what cannot be used, with a warning
    for each; otherwise any problem is an error. Labels are numbered 1, 2, ... in the order of their stored values; 0/1
    and 0/255 both mean background and foreground. test_seed: see `split_draws`.
    """
    if grouping not in GROUPINGS:
        raise unknown("grouping", grouping, GROUPINGS)
    if slices not in SLICES:
        raise unknown("slices", slices, SLICES)
    if ignore is not None and not 0 <= ignore <= 255:
        raise FedloraError(f"ignore is a stored label from 0 to 255, got {ignore}")
    data = _prepared(Path(path).expanduser(), size, slices, ignore, skip_broken, use_cache)
    images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)  # (N, 3, H, W) uint8
    masks = torch.from_numpy(data["masks"])
    names = data["sites"].tolist()
    if isinstance(group, Mapping):
        for site in group:
            if site not in names:
                raise unknown("site", site, names)
    sites = []
    for number, name in enumerate(names):
        rows = np.flatnonzero(data["site"] == number)
        stems = [str(data["stems"][i]) for i in data["stem"][rows]]
        pattern = group.get(name) if isinstance(group, Mapping) else group
        try:
            parts = split_stems(stems, split_draws(seed, number, test_seed=test_seed), grouping, pattern)
        except FedloraError as error:
            raise FedloraError(f"site '{name}' of {path}: {error}") from error
        record: dict[str, Any] = {
            "origin": "folder",
            "path": str(path),
            "split": f"group {pattern}" if pattern else grouping,
            "files": {
                k: sorted({stems[i] for i in part}) for k, part in zip(("train", "val", "test"), parts, strict=True)
            },
        }
        train, val, test = (Split(images[rows[part]].float() / 255, masks[rows[part]]) for part in parts)
        sites.append(Site(name, train, val, test, record))
    return Dataset(
        name=Path(path).stem,
        sites=tuple(sites),
        classes=tuple(data["classes"].tolist()),
        note=f"Read from {path}. Split within each site: {'by group' if group else grouping}.",
        licence="the reader's own data",
    )


def split_stems(
    stems: list[str], draws: Sequence[np.random.Generator], grouping: str, pattern: str | None
) -> list[list[int]]:
    """[train, val, test] rows: whole groups if a pattern names them, else whole files, contiguous or at random."""
    if pattern:
        return split_groups([group_of(stem, pattern) for stem in stems], *draws)
    files = list(dict.fromkeys(stems))  # in natural order, each once
    chosen = [{files[i] for i in part} for part in split_items(len(files), *draws, grouping=grouping)]
    return [[row for row, stem in enumerate(stems) if stem in part] for part in chosen]


def group_of(stem: str, pattern: str) -> str:
    """The patient, video or case that a file name belongs to."""
    try:
        match = re.search(pattern, stem)
    except re.error as error:
        raise FedloraError(f"the group pattern '{pattern}' is not a regular expression: {error}") from error
    if match is None:
        raise FedloraError(f"the group pattern '{pattern}' does not match the name '{stem}'")
    return match.group(1) if match.re.groups else match.group(0)


def _prepared(
    path: Path, size: int, slices: str, ignore: int | None, skip_broken: bool, use_cache: bool
) -> dict[str, np.ndarray]:
    """Decoded and resized arrays, from the cache if the files have not changed since."""
    key = json.dumps([FORMAT, str(path.resolve()), _stamp(path), size, slices, ignore])
    cached = home() / "folder" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if use_cache and _is_there(cached):
        return load_npz(cached)
    data, clean = _read(path, size, slices, ignore, skip_broken)
    if use_cache and clean:
        try:
            save_npz(cached, **data)
        except FedloraError as error:  # it will be read again the next time
            warnings.warn(f"not kept for the next time: {error}", stacklevel=2)
            return data
        for old in sorted(cached.parent.glob("*.npz"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return data


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may not be looked into
        return False


def _stamp(path: Path) -> list[int]:
    """Changes when a file is added, removed or written: count, total size, newest and summed modification times."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = [p.stat() for p in files]
    times = [s.st_mtime_ns for s in stats]
    return [len(stats), sum(s.st_size for s in stats), max(times, default=0), sum(times)]


def _read(
    path: Path, size: int, slices: str, ignore: int | None, skip_broken: bool
) -> tuple[dict[str, np.ndarray], bool]:
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    owners: list[tuple[str, str]] = []
    mixed = False  # one mask that holds both 1 and 255: then they are two labels

    def visit(site: str, stem: str, pictures: np.ndarray, labels: np.ndarray) -> None:
        nonlocal mixed
        keep = list(range(len(labels)))
        if slices == "foreground" and len(labels) > 1:
            keep = np.flatnonzero(labels.reshape(len(labels), -1).any(1)).tolist() or [len(labels) // 2]
        for i in keep:
            images.append(_resize(pictures[i], size, smooth=True))
            masks.append(_resize(labels[i], size, smooth=False))
            owners.append((site, stem))
            mixed = mixed or bool((labels[i] == 1).any() and (labels[i] == 255).any())

    layout = open_layout(path)
    try:
        report = examine(layout, visit, progress=True)
    finally:
        layout.close()
    if report.problems:
        _refuse_or_warn(report, path, skip_broken)
    full = {site for site, summary in report.sites.items() if any(v not in (0, ignore) for v in summary["labels"])}
    barren = sorted(site for site, summary in report.sites.items() if summary["images"] and site not in full)
    full -= {site for site, summary in report.sites.items() if summary["images"] < LEAST}  # `report` says so
    if barren and not skip_broken:
        raise FedloraError(
            f"site '{barren[0]}' of {path}: no mask has any foreground besides the ignored label {ignore}"
        )
    rows = [i for i, (site, _) in enumerate(owners) if site in full]
    if not rows:
        raise FedloraError(f"{path}: nothing usable is left; see `fedlora data check {path}`")
    table, classes = _number_labels({v for s in full for v in report.sites[s]["labels"]}, ignore, mixed)
    sites = [site for site in report.sites if site in full]
    stems = list(dict.fromkeys(owners[i][1] for i in rows))
    place = {stem: n for n, stem in enumerate(stems)}
    data = {
        "images": np.stack([images[i] for i in rows]),
        "masks": table[np.stack([masks[i] for i in rows])],
        "site": np.array([sites.index(owners[i][0]) for i in rows], np.int32),
        "stem": np.array([place[owners[i][1]] for i in rows], np.int32),
        "sites": np.array(sites),
        "stems": np.array(stems),
        "classes": np.array(classes),
    }
    return data, report.ok


def _refuse_or_warn(report: Report, path: Path, skip_broken: bool) -> None:
    if skip_broken:
        for line in report.problems:
            warnings.warn(f"left out: {line}", stacklevel=2)
        return
    first = "\n".join(f"  - {line}" for line in report.problems[:3])
    more = f"\n  ... and {len(report.problems) - 3} more" if len(report.problems) > 3 else ""
    raise FedloraError(
        f"{path} has {len(report.problems)} problem(s):\n{first}{more}\n"
        f"`fedlora data check {path}` lists them all; the option skip_broken=true (Python: True) leaves out the broken"
    )


def _number_labels(found: set[int], ignore: int | None, mixed: bool) -> tuple[np.ndarray, list[str]]:
    """A table stored value -> class number, and the class names."""
    values = sorted(found - {0} - ({ignore} if ignore is not None else set()))
    table = np.zeros(256, np.uint8)
    if len(values) == 1 or (values == [1, 255] and not mixed):
        table[values] = 1
        classes = ["background", "foreground"]
    else:
        table[values] = np.arange(1, len(values) + 1)
        classes = ["background", *(f"label {v}" for v in values)]
    if ignore is not None:
        table[ignore] = IGNORE
    return table, classes


def _resize(values: np.ndarray, size: int, smooth: bool) -> np.ndarray:
    """Pictures: area average down, bilinear up. Labels: nearest."""
    from PIL import Image

    if values.shape[:2] == (size, size):
        return np.ascontiguousarray(values)
    shrinking = min(values.shape[:2]) >= size
    smooth_filter = Image.Resampling.BOX if shrinking else Image.Resampling.BILINEAR
    picture = Image.fromarray(np.ascontiguousarray(values))
    return np.asarray(picture.resize((size, size), smooth_filter if smooth else Image.Resampling.NEAREST))
