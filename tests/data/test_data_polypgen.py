"""PolypGen: hospitals from file names, either layout, no examination or sequence in two splits, scenes of C2 in one."""

import hashlib
import io
import runpy
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora_mini.data import fetch, load, options, polypgen, prepare, shift_table
from fedlora_mini.data.registry import available
from fedlora_mini.errors import FedloraError

STEMS = {
    "C1": [*(f"{exam}OLCV1_100H{i:04d}" for exam in (99, 104, 176, 177) for i in range(3)), "100H0050", "100S0001"],
    "C2": [f"EndoCV2021_00{1000 + 16 * i}" for i in range(27)],
    "C3": ["C3_EndoCV2021_002", "C3_EndoCV2021_0010", *(f"C3_EndoCV2021_00{100 + i}" for i in range(6))],
    "C4": [
        *(f"{seq}_endocv2021_positive_{seq}{i}" for seq in (4, 5, 6, 31) for i in range(2)),
        "31_endocv2021_negative_7",
    ],
    "C5": [f"EndoCV2021_C5_5000{i:04d}" for i in range(8)],
    "C6": [f"EndoCV2021_C6_01000{i:02d}" for i in range(8)],
}
COUNTS = {"C1": 256, "C2": 301, "C3": 457, "C4": 227, "C5": 208, "C6": 88}
EMPTY = {"C1": 5, "C2": 32, "C3": 1, "C4": 81, "C5": 2, "C6": 5}
# One scene in both series of C2, by eye: frames of the first and of the second.
SCENES = ((1008, 1260), (1034, 1284), (1057, 1309), (1060, 1306), (1079, 1321), (1107, 1337), (1121, 1340))
SCENES += ((1140, 1346), (1171, 1374), (1191, 1387), (1244, 1420))


def encode(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, quality=95)
    return buffer.getvalue()


def frame(site: str, stem: str, shape: tuple[int, int] = (96, 96)) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on a ground that differs by hospital; the first frame of each has no polyp."""
    height, width = shape
    y, x = np.indices(shape)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(stem.encode()).digest()[:4], "big"))
    disc = ((y / height - rng.uniform(0.3, 0.7)) ** 2 + (x / width - rng.uniform(0.3, 0.7)) ** 2) < 0.04
    if stem == STEMS[site][0]:
        disc[:] = False
    image = np.full((*shape, 3), 20 + 15 * int(site[1]), np.uint8)
    image[disc] = 220
    return image, disc


def squeezed(kind: str = "PNG") -> dict[str, bytes]:
    """The tested packing: the mask is called like its image."""
    files = {"polypgen256/README.txt": b"six hospitals"}
    for site, stems in STEMS.items():
        for stem in stems:
            image, disc = frame(site, stem)
            files[f"polypgen256/{site}/images/{stem}.jpg"] = encode(image, "JPEG")
            files[f"polypgen256/{site}/masks/{stem}.png"] = encode((disc * 255).astype(np.uint8), kind)
    return files


def snapshot() -> dict[str, bytes]:
    """The repository's layout: larger oblong frames in split folders without the hospital, masks as JPEG `_mask`."""
    root = "PolypSegmentation-b7280857/effisegnet/PolypGen"
    files = {"PolypSegmentation-b7280857/main.py": b"pass", f"{root}/train/images/seq1_C2_frame_001.jpg": b"a sequence"}
    for site, stems in STEMS.items():
        for i, stem in enumerate(stems):
            part = ("train", "validation", "test")[i % 3]
            image, disc = frame(site, stem, (192, 240))
            grey = np.repeat((disc * 255).astype(np.uint8)[..., None], 3, 2)
            files[f"{root}/{part}/images/{stem}.jpg"] = encode(image, "JPEG")
            files[f"{root}/{part}/masks/{stem}_mask.jpg"] = encode(grey, "JPEG")
            files[f"{root}/bbox_image_C1/{stem}_mask_bbox.jpg"] = b"not a mask"
    return files


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def digest(lines: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {lines[name]}\n" for name in sorted(lines)).encode()).hexdigest()


def refused(path: Path, words: str) -> None:
    with pytest.raises(FedloraError, match=words):
        prepare("polypgen", path)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return squeezed()


@pytest.fixture
def small(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    contents = {}
    for name, data in files.items():
        if "/images/" in name or "/masks/" in name:
            site, folder, file = name.split("/")[1:]
            contents[f"{site}/{file[:-4]}/{folder[:-1]}"] = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(polypgen, "CONTENT_SHA256", digest(contents))
    names = {f"{site}/{stem}": "" for site, stems in STEMS.items() for stem in stems}
    monkeypatch.setattr(polypgen, "NAMES_SHA256", digest(names))
    return write_zip(tmp_path / "download.zip", files)


def test_five_hospitals_train_and_alexandria_is_unseen(small: Path) -> None:
    prepare("polypgen", small)
    data = load("polypgen")
    assert [s.name for s in data.sites] == ["C1", "C2", "C3", "C4", "C5"] and [s.name for s in data.unseen] == ["C6"]
    assert data.classes == ("background", "polyp") and data.channels == 3 and data.spatial == (64, 64)
    assert "CC BY 4.0" in data.licence and "10.1038/s41597-023-01981-y" in data.licence and "patient" in data.note
    for site in (*data.sites, *data.unseen):
        files = [stem for part in site.record["files"].values() for stem in part]
        assert sorted(files) == sorted(STEMS[site.name]) and site.record["frames"] == len(files)
        assert sum(site.record["empty_masks"].values()) == 1
    assert options("polypgen") == {"test_seed": None}
    assert list(shift_table(data).index) == ["C1", "C2", "C3", "C4", "C5", "C6"]


def test_every_frame_keeps_its_own_mask_at_any_size(small: Path) -> None:
    for size in (64, 24, 128):
        prepare("polypgen", small, size)
        data = load("polypgen", size=size)
        for site in (*data.sites, *data.unseen):
            for part in ("train", "val", "test"):
                split = getattr(site, part)
                assert split.masks.unique().tolist() in ([0, 1], [0], [1])
                for row, stem in enumerate(site.record["files"][part]):
                    wanted = frame(site.name, stem, (size, size))[1]
                    assert (split.masks[row].numpy() == wanted).mean() > 0.97
                    bright = split.images[row, 1] > (120 + 7.5 * int(site.name[1])) / 255  # half way to the disc
                    assert (bright == (split.masks[row] == 1)).float().mean() > 0.97


def test_the_snapshot_layout_gives_the_same_frames(small: Path, tmp_path: Path) -> None:
    first = polypgen.squeeze_frames(small, 48)
    path = write_zip(tmp_path / "snapshot.zip", snapshot())
    polypgen.verify(path)
    again = polypgen.squeeze_frames(path, 48)
    assert first["stems"].tolist() == again["stems"].tolist() and first["site"].tolist() == again["site"].tolist()
    assert first["stems"].tolist()[-8:] == STEMS["C6"] and first["sites"].tolist() == list(STEMS)
    masks = [np.unpackbits(data["mask_bits"], axis=1) for data in (first, again)]
    assert (masks[0] != masks[1]).mean() < 0.02  # drawn at another size, smeared by JPEG
    gap = np.abs(first["images"].astype(int) - again["images"].astype(int)).mean()
    assert gap < 3


def test_a_frame_in_two_folders_must_be_the_same_in_both(small: Path, tmp_path: Path) -> None:
    twice = snapshot()
    name = "PolypSegmentation-b7280857/effisegnet/PolypGen/train/masks/100H0050_mask.jpg"
    source = next(n for n in twice if n.endswith("/100H0050_mask.jpg"))
    copy = name.replace("effisegnet/PolypGen", "data/data")
    polypgen.verify(write_zip(tmp_path / "a.zip", twice | {copy: twice[source]}))
    refused(
        write_zip(tmp_path / "b.zip", twice | {copy: twice[source][:-9] + b"x" * 9}), "differ, but are the same mask"
    )


def test_a_folder_is_read_like_its_zip(small: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        archive.extractall(tmp_path / "frames")
    one, two = (polypgen.squeeze_frames(path, 32) for path in (small, tmp_path / "frames"))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    prepare("polypgen", tmp_path / "frames" / "polypgen256", 32)
    with np.load(polypgen.prepared(32), allow_pickle=False) as stored:
        assert all(np.array_equal(one[key], stored[key]) for key in stored.files)
    (tmp_path / "frames" / "polypgen256" / "C1" / "masks" / "100H0050.png").unlink()
    refused(tmp_path / "frames", "C1 13, C2 27")


def test_a_wrong_archive_is_refused(
    files: dict[str, bytes], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: Path
) -> None:
    mask = "polypgen256/C3/masks/C3_EndoCV2021_002.png"
    other = write_zip(tmp_path / "other.zip", files | {mask: files[mask.replace("2021_002", "2021_0010")]})
    refused(other, "corrupt or another version: content")
    refused(write_zip(tmp_path / "less.zip", {n: d for n, d in files.items() if n != mask}), "C3 7, C4 9")
    refused(write_zip(tmp_path / "none.zip", {"README": b"r"}), "complete frames found: none")
    refused(write_zip(tmp_path / "up.zip", files | {f"../{mask}": b"x"}), "unsafe name")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(small.read_bytes()[:9000])
    refused(cut, "not a readable zip")
    body = bytearray(small.read_bytes())
    at = body.index(files[mask.replace("2021_002", "2021_0010")])
    body[at + 40] ^= 255
    cut.write_bytes(body)
    refused(cut, "C3_EndoCV2021_0010.png cannot be read: Bad CRC-32")
    monkeypatch.setattr(polypgen, "FILE_SHA256", hashlib.sha256(other.read_bytes()).hexdigest())
    assert not list(own_home.rglob("*.npz"))
    polypgen.verify(other)  # the file's own digest is enough


def test_groups_stay_whole_and_the_seed_decides(small: Path) -> None:
    prepare("polypgen", small, 16)
    seen = set()
    for seed in range(6):
        data, again = (load("polypgen", size=16, seed=seed) for _ in range(2))
        for site, same in zip((*data.sites, *data.unseen), (*again.sites, *again.unseen), strict=True):
            assert site.record == same.record and torch.equal(site.train.images, same.train.images)
            assert all(site.sizes().values()) and [*site.sizes().values()] == [*map(len, site.record["files"].values())]
        for site, mark in ((data.sites[0], "OLCV1"), (data.sites[3], "_")):
            groups = [
                {stem.split(mark)[0] if mark in stem else "?" for stem in p} for p in site.record["files"].values()
            ]
            if mark == "OLCV1":  # 100H0050 holds no mark, and stays with 100S0001
                assert sum("?" in part for part in groups) == 1
            assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
            assert [len(part) for part in groups] == [len(part) for part in site.record["groups"].values()]
        for site in (data.sites[2], data.sites[4], data.unseen[0]):
            rows = [[STEMS[site.name].index(stem) for stem in part] for part in site.record["files"].values()]
            assert all(part == list(range(part[0], part[0] + len(part))) for part in rows)
        seen.add(str(data.sites[4].record["files"]))
    assert 1 < len(seen) <= 6


def test_the_two_series_of_c2_are_cut_at_the_same_patients() -> None:
    stems = [f"EndoCV2021_00{number}" for number in range(1000, 1432)]
    order = sorted(stems, key=lambda stem: polypgen.position("C2", stem))
    for first, second in SCENES:
        gap = order.index(f"EndoCV2021_00{first}") - order.index(f"EndoCV2021_00{second}")
        assert abs(gap) <= 20  # of 432; apart by 180 to 250 numbers in the names
    assert [s for s in order if s < "EndoCV2021_001257"] == stems[:257]  # within a series nothing moves
    assert [s for s in order if s >= "EndoCV2021_001257"] == stems[257:]


def test_without_the_data_the_error_says_what_to_run() -> None:
    row = next(r for r in available() if r["name"] == "polypgen")
    assert (
        row["ready"] == "run `fedlora data fetch polypgen`" and row["licence"] == "CC BY 4.0" and row["kind"] == "real"
    )
    with pytest.raises(FedloraError, match="fedlora data fetch polypgen"):
        load("polypgen")


def test_the_script_downloads_through_an_interruption(
    small: Path, server, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body, server.drop_after = small.read_bytes(), [20_000]
    monkeypatch.setattr("time.sleep", lambda _: None)
    script = Path(__file__).parents[2] / "data_scripts" / "polypgen.py"
    monkeypatch.setattr(sys, "argv", ["polypgen.py", "--from", server.url, "--size", "32"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "C1 Paris: 14 frames, 5 groups, 1 empty masks" in printed and "CC BY 4.0" in printed
    assert (own_home / polypgen.ARCHIVE).read_bytes() == server.body and server.ranges == [None, "bytes=20000-"]
    assert fetch("polypgen") == polypgen.prepared(64)
    monkeypatch.setattr(sys, "argv", ["polypgen.py", "--from", str(own_home / "nothing")])
    with pytest.raises(SystemExit, match="no file"):
        runpy.run_path(str(script), run_name="__main__")


def test_the_public_home_is_asked_when_nothing_is_here(
    small: Path, server, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert polypgen.URL.endswith("/zip/b72808574340a94db3f547e36363872a9b525962")
    monkeypatch.setattr(polypgen, "URL", server.url)
    server.body, server.honour_range = (
        small.read_bytes().replace(b"EndoCV2021_C6_0100001", b"EndoCV2021_C6_0100099"),
        False,
    )
    with pytest.raises(FedloraError, match="refused and deleted"):
        fetch("polypgen")
    assert not [p for p in own_home.rglob("*") if p.is_file()]
    server.body = small.read_bytes()
    assert fetch("polypgen") == polypgen.prepared(64)


@pytest.mark.slow
def test_the_real_frames_are_those_of_the_paper(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = real_data / polypgen.ARCHIVE
    if not path.is_file():
        pytest.skip("the local copy of the data sets holds no PolypGen")
    polypgen.verify(path)
    monkeypatch.setattr(polypgen, "FILE_SHA256", "so that the content is checked")
    data = load("polypgen")
    sites = {s.name: s for s in (*data.sites, *data.unseen)}
    assert {name: sum(s.sizes().values()) for name, s in sites.items()} == COUNTS
    assert {name: sum(s.record["empty_masks"].values()) for name, s in sites.items()} == EMPTY
    with zipfile.ZipFile(path) as archive:
        for name, site in sites.items():
            assert site.train.masks.unique().tolist() == [0, 1]
            stem = site.record["files"]["test"][3]
            raw = np.asarray(Image.open(archive.open(f"polypgen256/{name}/images/{stem}.jpg")).convert("RGB"))
            area = raw.reshape(64, 4, 64, 4, 3).mean((1, 3)).transpose(2, 0, 1) / 255
            assert np.abs(site.test.images[3].numpy() - area).max() < 1.1 / 255  # rounded after each axis
            mask = np.asarray(Image.open(archive.open(f"polypgen256/{name}/masks/{stem}.png")))
            assert np.array_equal(site.test.masks[3].numpy(), mask.reshape(64, 4, 64, 4).mean((1, 3)) >= 0.5)
    means = {
        n: torch.cat([s.train.images, s.val.images, s.test.images]).mean((0, 2, 3)) * 255 for n, s in sites.items()
    }
    assert torch.allclose(means["C1"], torch.tensor([158.0, 99, 68]), atol=1)
    assert torch.allclose(means["C5"], torch.tensor([95.0, 70, 53]), atol=1)
    with pytest.raises(FedloraError, match="unknown site 'C7'"):
        load("polypgen", unseen="C7")

    again = load("polypgen")
    assert [s.record for s in data.sites] == [s.record for s in again.sites]
    seen = set()
    for seed in range(12):
        for name, site in sites.items():
            stems = [stem for part in site.record["files"].values() for stem in part]
            parts = polypgen.split_frames(name, stems, np.random.default_rng(seed))
            part_of = {stems[row]: number for number, part in enumerate(parts) for row in part}
            assert sum(map(len, parts)) == len(part_of) == COUNTS[name]
            shares = [len(part) / COUNTS[name] for part in parts]
            assert max(abs(a - b) for a, b in zip(shares, (0.7, 0.15, 0.15), strict=True)) < 0.02
            if name in ("C1", "C4"):
                owner = {stem: stem.partition("OLCV1" if name == "C1" else "_")[0] for stem in stems}
                split = {who: {part_of[s] for s in stems if owner[s] == who} for who in set(owner.values())}
                assert all(len(parts) == 1 for parts in split.values())
            if name == "C2":
                assert all(part_of[f"EndoCV2021_00{a}"] == part_of[f"EndoCV2021_00{b}"] for a, b in SCENES)
            seen.add((name, str(part_of)))
    assert {name for name, _ in seen} == set(COUNTS) and len(seen) > 12
