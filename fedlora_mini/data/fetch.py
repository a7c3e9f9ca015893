"""Download, resume, verify, and only then rename: a file under its final name is always whole and always the right one.

    .part  --Range request, retried-->  complete .part  --verify-->  final name

A broken connection leaves the `.part` to resume from; a file that fails its check is deleted. Nothing is ever unpacked:
archives are read in place, and a member name that points outside the archive is refused.
"""

import hashlib
import os
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from fedlora_mini.errors import FedloraError

BLOCK = 1 << 20
Verify = Callable[[Path], None]  # raises FedloraError if the file is not the expected one


def home() -> Path:
    """Where downloads and prepared data live: $FEDLORA_HOME, else ~/.cache/fedlora_mini."""
    return Path(os.environ.get("FEDLORA_HOME") or Path.home() / ".cache" / "fedlora_mini").expanduser()


def mirror(relative: str) -> Path | None:
    """The file in the local copy of the data sets that $FEDLORA_DATA_MIRROR names, if it is there."""
    root = os.environ.get("FEDLORA_DATA_MIRROR")
    path = Path(root).expanduser() / relative if root else None
    return path if path is not None and path.is_file() else None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def expect_sha256(expected: str) -> Verify:
    """The usual check: the file's own sha256."""

    def verify(path: Path) -> None:
        found = sha256(path)
        if found != expected:
            raise FedloraError(f"{path.name} is corrupt or another version: sha256 {found}, expected {expected}")

    return verify


def expect_commit(expected: str, commit: str) -> Verify:
    """A file by its sha256, or a zip that carries the commit's id in its comment, as GitHub's do."""

    def verify(path: Path) -> None:
        if sha256(path) == expected:
            return
        try:
            with zipfile.ZipFile(path) as archive:
                said = archive.comment.decode("ascii", "replace")
        except (zipfile.BadZipFile, OSError):
            said = "no zip comment"
        if not said.startswith(commit):
            raise FedloraError(f"{path.name} is corrupt or another version: '{said}', expected commit {commit}")

    return verify


def own_folder(relative: str, source: str | os.PathLike[str] | None) -> Path | None:
    """`source` if it is a folder that holds the data themselves instead of the archive `relative`."""
    folder = Path(source or "").expanduser()
    holds = any((folder / name).is_file() for name in (relative, Path(relative).name))
    return folder if source and folder.is_dir() and not holds else None


def obtain(relative: str, url: str, verify: Verify, source: str | os.PathLike[str] | None = None) -> Path:
    """The verified file: from `source` (a file, a folder that holds it, or a URL), else cache, local copy or `url`.

    relative: its place under `home()` and in a local copy, e.g. "nuclei/stage1_train.zip". A local file is used where
    it lies; a download lands in `home()`.
    """
    target = home() / relative
    if source is not None:
        text = os.fspath(source)
        if text.startswith(("http://", "https://")):
            return download(text, target, verify)
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [path / relative, path / Path(relative).name]
            path = next((p for p in inside if p.is_file()), inside[-1])
        if not path.is_file():
            raise FedloraError(f"there is no file {path}; give a file, a folder that holds it, or an http(s) URL")
        verify(path)
        return path
    local = target if target.is_file() else mirror(relative)
    if local is not None:
        verify(local)
        return local
    return download(url, target, verify)


def obtain_packed(
    packing: str, repository: str, url: str, verify: Verify, source: str | os.PathLike[str] | None = None
) -> Path:
    """`obtain` where a small packing of a repository may be at hand: else it is the repository's zip, from `url`."""
    at_hand = source is not None or (home() / packing).is_file() or mirror(packing) is not None
    return obtain(packing if at_hand else repository, url, verify, source)


def download(url: str, target: Path, verify: Verify, *, attempts: int = 5, pause: float = 1.0) -> Path:
    """Fetches `url` to `target` through `target.part`; resumes, gives up after `attempts` without progress."""
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedloraError(f"cannot write {target} ({error.strerror}); FEDLORA_HOME names the folder to use") from None
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part)
            break
        except (OSError, HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in (408, 416, 429, 500, 502, 503, 504):
                raise FedloraError(f"{url} cannot be downloaded: HTTP {error.code} {error.reason}") from error
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures >= attempts:
                raise FedloraError(
                    f"{url} cannot be downloaded ({error}); {after:,} bytes are kept, run the same command to resume"
                ) from error
            time.sleep(pause * 2 ** min(failures, 5) if pause else 0)
    try:
        verify(part)
    except FedloraError as error:
        part.unlink()
        raise FedloraError(f"the download from {url} was refused and deleted: {error}") from error
    os.replace(part, target)
    return target


def _transfer(url: str, part: Path) -> None:
    """One connection: appends to `part` if the server honours Range, starts again if it does not."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "fedlora_mini", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies after `have`: the part is whole, or of another file
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink(missing_ok=True)
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=part.name.removesuffix(".part"),
            leave=False,
            disable=None,
        )
        with open(part, "ab" if resumed else "wb") as file, bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                have += len(block)
    if total is not None and have < total:  # a dropped connection looks like an early end
        raise OSError(f"the connection ended after {have:,} of {total:,} bytes")


def safe_name(name: str) -> str:
    """An archive member's name, refused if it is absolute or climbs out of the archive."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise FedloraError(f"the archive holds the unsafe name '{name}' and is refused")
    return str(path)


def members(archive: zipfile.ZipFile, under: str) -> dict[str, zipfile.ZipInfo]:
    """Files below the folder `under`, wherever the archive keeps it: {"a/b.png": info}, named from `under` on."""
    found = {}
    for info in archive.infolist():
        parts = PurePosixPath(safe_name(info.filename)).parts
        if not info.is_dir() and under in parts[:-1]:
            found["/".join(parts[parts.index(under) + 1 :])] = info
    return found


def tar_files(path: Path, suffix: str = "") -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every regular file of a tar archive, read in place; links and devices are passed over."""
    try:
        with tarfile.open(path) as archive:
            for info in archive:
                name = safe_name(info.name)
                if info.isreg() and name.endswith(suffix) and (file := archive.extractfile(info)) is not None:
                    yield name, file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise FedloraError(f"{path.name} is not a readable tar archive: {error}") from error


def names_digest(digests: Mapping[str, str]) -> str:
    """sha256 over the lines "<name> <digest>" in the order of the names."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def content_digest(path: Path, under: str, suffix: str = "") -> str:
    """`names_digest` of a zip's files by the sha256 of their bytes: the same for every packing of the same files."""
    from tqdm import tqdm

    digests = {}
    try:
        with zipfile.ZipFile(path) as archive:
            chosen = {k: v for k, v in members(archive, under).items() if k.endswith(suffix)}
            for name in tqdm(sorted(chosen), desc=f"checking {path.name}", leave=False, delay=1, disable=None):
                digests[name] = hashlib.sha256(archive.read(chosen[name])).hexdigest()
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise FedloraError(f"{path.name} is not a readable zip archive: {error}") from error
    return names_digest(digests)
