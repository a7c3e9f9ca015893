"""<root>/<site>/{images,masks}/<name>.<ext>, in a folder or in a zip: which file is whose twin, and what does not fit.

A mask belongs to the image with the same stem; its extension may be another one. Extra folders above the sites are fine
(archives usually have one), files elsewhere are ignored.
"""

import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from fedlora_mini.data.fetch import safe_name
from fedlora_mini.data.splits import natural
from fedlora_mini.errors import FedloraError

EXTENSIONS = (".nii.gz", ".nii", ".npy", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
EXPECTED = "expected <root>/<site>/images/<name>.png and <root>/<site>/masks/<name>.png"


@dataclass
class Layout:
    """sites[site][stem] = (image name, mask name); `problems` are the lines a reader must act on."""

    root: Path
    archive: zipfile.ZipFile | None
    sites: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self, name: str) -> bytes:
        return self.archive.read(name) if self.archive else (self.root / name).read_bytes()

    def close(self) -> None:
        if self.archive:
            self.archive.close()


def split_extension(name: str) -> tuple[str, str]:
    """("case1", ".nii.gz"): the stem, and the extension in lower case ("" if it is not one that can be read)."""
    for extension in EXTENSIONS:
        if name.lower().endswith(extension):
            return name[: -len(extension)], extension
    return name, ""


def open_layout(path: str | Path) -> Layout:
    """Lists the pairs and the problems of the arrangement; opens no image. Raises if there is nothing to list."""
    root = Path(path).expanduser()
    if root.is_dir():
        layout = Layout(root, None)
        names = [p.relative_to(root).as_posix() + ("/" if p.is_dir() else "") for p in sorted(root.rglob("*"))]
    elif root.is_file() and zipfile.is_zipfile(root):
        layout = Layout(root, zipfile.ZipFile(root))
        names = layout.archive.namelist() if layout.archive else []
        for name in names:
            safe_name(name)
    elif root.is_file():
        raise FedloraError(f"{root} is neither a folder nor a zip archive; {EXPECTED}")
    else:
        raise FedloraError(f"there is no folder or zip archive {root}")
    _sort_into_sites(layout, names)
    return layout


def _sort_into_sites(layout: Layout, names: list[str]) -> None:
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: {"images": {}, "masks": {}})
    homes: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = PurePosixPath(name).parts
        kinds = [i for i, part in enumerate(parts) if part.lower() in ("images", "masks")]
        if not kinds or any(part.startswith((".", "__MACOSX")) for part in parts) or parts[-1] == "Thumbs.db":
            continue
        at = kinds[0]
        if at == 0:
            line = f"'{parts[0]}' lies directly in {layout.root.name}, without a folder for its site; {EXPECTED}"
            if line not in layout.problems:
                layout.problems.append(line)
            continue
        site, kind, rest = parts[at - 1], parts[at].lower(), parts[at + 1 :]
        homes[site].add("/".join(parts[: at - 1]))
        bucket = found[site][kind]
        if not rest or name.endswith("/"):
            continue
        stem, extension = split_extension(rest[-1])
        if len(rest) > 1:
            layout.problems.append(f"{name}: lies in a folder inside '{kind}'; files are expected directly in it")
        elif not extension:
            layout.problems.append(f"{name}: type not known; readable are {', '.join(EXTENSIONS)}")
        elif stem in bucket:
            layout.problems.append(
                f"{name}: there is also {PurePosixPath(bucket[stem]).name}; one file a name is expected"
            )
        else:
            bucket[stem] = name
    for site in sorted(found, key=natural):
        if len(homes[site]) > 1:
            layout.problems.append(f"site '{site}' exists in several folders: {', '.join(sorted(homes[site]))}")
        layout.sites[site] = _pair(layout, site, found[site]["images"], found[site]["masks"])
    if not layout.sites and not layout.problems:
        layout.problems.append(f"{layout.root} holds no <site>/images folder; {EXPECTED}")


def _pair(layout: Layout, site: str, images: dict[str, str], masks: dict[str, str]) -> dict[str, tuple[str, str]]:
    if not images:
        layout.problems.append(f"site '{site}' is empty: no readable file in {site}/images")
    for stem in sorted(images.keys() - masks.keys(), key=natural):
        near = get_close_matches(stem, masks.keys() - images.keys(), n=1, cutoff=0.6)
        hint = f" (is it {near[0]}? the name before the extension must be equal)" if near else ""
        layout.problems.append(f"{images[stem]}: no mask of this name in {site}/masks{hint}")
    for stem in sorted(masks.keys() - images.keys(), key=natural):
        layout.problems.append(f"{masks[stem]}: no image of this name in {site}/images")
    return {stem: (images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys(), key=natural)}
