"""Vessels: split by person, tiles and shrunk images by written rules, both kinds of archive, what the note claims."""

import hashlib
import io
import runpy
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora_mini.data import fetch, load, options, prepare, vessels
from fedlora_mini.data.fetch import sha256
from fedlora_mini.data.registry import available
from fedlora_mini.data.store import load_npz, unpack
from fedlora_mini.errors import FedloraError

CHASE = [f"Image_{child:02d}{eye}" for child in range(1, 6) for eye in "LR"]
HRF = [f"{n:02d}_{diagnosis}" for diagnosis in ("dr", "g", "h") for n in range(7, 11)]
ID = vessels.COMMIT.ljust(40, "0")


def eye(number: int, height: int = 256, width: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A bright ellipse on black with thin lines as vessels."""
    y, x = np.indices((height, width)) / [[[height]], [[width]]] - 0.5
    retina = x**2 + y**2 < 0.22
    image = np.where(retina[..., None], [200, 80 + number, 30], 0).astype(np.uint8)
    mask = retina & ((np.abs(np.sin(40 * x + number)) < 0.12) | (np.abs(y) < 0.01))
    image[mask] = 40
    return image, mask


def write_packing(path: Path) -> Path:
    pairs = [eye(i) for i in range(len(CHASE + HRF))]
    bits = np.packbits(np.stack([mask for _, mask in pairs]).reshape(len(pairs), -1), axis=1)
    names = np.array([f"{name}.jpg" for name in CHASE + HRF])
    np.savez_compressed(path, image=np.stack([image for image, _ in pairs]), mask_bits=bits, name=names)
    return path


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def repository(path: Path, comment: str = ID, **changes: bytes | None) -> Path:
    """The originals in folders, with files of other sets and a second observer; None leaves a file out."""
    files = {"README.md": b"", "data/DRIVE/training/images/21_training.tif": b"", "data/x/Image_01L_2ndHO.png": b""}
    for i, name in enumerate(CHASE + HRF):
        shape = (480, 500) if name in CHASE else (320, 480)
        image, mask = eye(i, *shape)
        folder = "data/CHASEDB_1/training" if name in CHASE else "data/HRF/test"
        files[f"{folder}/images/{name}.jpg"] = png(image, "JPEG")
        files[f"{folder}/mask/{name}{'_1stHO.png' if name in CHASE else '.tif'}"] = png(
            mask.astype(np.uint8) * 255, "PNG" if name in CHASE else "TIFF"
        )
    by_name = {Path(name).name: name for name in files}
    for name, data in changes.items():
        files[by_name.get(name, f"data/{name}")] = data
    with zipfile.ZipFile(path, "w") as out:
        out.comment = comment.encode()
        for name, data in files.items():
            if data is not None:
                out.writestr(f"Retinal-vessels-segmentation-{ID}/{name}", data)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packing(tmp_path_factory.mktemp("packing") / "any name.npz")


@pytest.fixture
def packing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vessels, "FILE_SHA256", sha256(archive))
    return archive


def test_two_sites_with_every_person_in_one_split(packing: Path) -> None:
    prepare("vessels", packing)
    splits = set()
    for seed in range(6):
        data = load("vessels", seed=seed)
        assert [s.name for s in data.sites] == ["CHASE", "HRF"] and not data.unseen
        assert data.classes == ("background", "vessel") and data.channels == 3 and data.spatial == (64, 64)
        for site, names in zip(data.sites, (CHASE, HRF), strict=True):
            ids = site.record["image_ids"]
            assert sorted(ids["train"] + ids["val"] + ids["test"]) == sorted(names)
            people = [{vessels.person(name) for name in part} for part in ids.values()]
            assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
            assert site.record["people"] == len(set().union(*people)) and site.record["made_from"] == "packing"
        splits.add(str(data.sites[1].record["image_ids"]))
    assert len(splits) > 1 and "CC BY 4.0" in data.licence and "by person" in data.note


def test_both_eyes_of_a_child_and_neighbours_of_one_diagnosis_are_one_person() -> None:
    assert vessels.person("Image_07L") == vessels.person("Image_07R") != vessels.person("Image_08L")
    people = defaultdict(list)
    for diagnosis in ("h", "g", "dr"):
        for n in range(1, 16):
            people[vessels.person(f"{n:02d}_{diagnosis}")].append(f"{n:02d}_{diagnosis}")
    groups = [tuple(sorted(group)) for group in people.values()]
    assert ("01_h", "02_h") in groups and ("09_g", "10_g") in groups and ("15_g",) in groups
    assert ("07_dr", "08_dr") in groups and ("09_dr",) in groups and ("14_dr", "15_dr") in groups
    assert len(groups) == 24 and all(len({name[3:] for name in group}) == 1 for group in groups)


def test_the_images_of_a_split_do_not_depend_on_size_or_tiling(packing: Path) -> None:
    prepare("vessels", packing)
    assert options("vessels") == {"patch": True, "test_seed": None}
    found = {
        str([s.record["image_ids"] for s in load("vessels", size=size, patch=patch, seed=3).sites])
        for size, patch in ((64, True), (64, False), (48, True), (256, True))
    }
    assert len(found) == 1


@pytest.mark.parametrize("size", [48, 64, 128])
def test_tiles_are_windows_of_the_images_that_show_retina(size: int, packing: Path) -> None:
    prepare("vessels", packing)
    for site in load("vessels", size=size).sites:
        row = 0
        for name in site.record["image_ids"]["train"]:
            image, mask = eye((CHASE + HRF).index(name))
            tops = {48: (8, 56, 104, 152, 200), 64: (0, 64, 128, 192), 128: (0, 128)}[size]  # the ellipse: 240 pixels
            for top in tops:
                for left in tops:
                    window = np.s_[top : top + size, left : left + size]
                    if (image[window].max(2) > 20).sum() < size * size / 4:
                        continue
                    assert np.array_equal(
                        (site.train.images[row] * 255).round().numpy(), image[window].transpose(2, 0, 1)
                    )
                    assert np.array_equal(site.train.masks[row].numpy(), mask[window])
                    row += 1
        assert row == len(site.train)


def test_the_grid_lies_over_the_retina_and_inside_the_image() -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    image[42:213, 9:249] = 90  # HRF's field: 171 x 240 pixels
    assert vessels.choose_tiles(image, 64) == [(top, left) for top in (31, 95, 159) for left in (0, 64, 128, 192)]
    image[:], image[200:, 190:] = 0, 90
    assert vessels.choose_tiles(image, 64) == [
        (192, 192)
    ]  # of two tiles side by side the left one shows next to nothing
    assert vessels.choose_tiles(np.zeros((256, 256, 3), np.uint8), 64) == []


def test_a_shrunk_pixel_is_vessel_from_three_tenths_on() -> None:
    mask = np.zeros((8, 8), bool)
    mask[0, :4] = True  # 4 of 16 pixels of the first block
    mask[0, 4:] = mask[1, 4] = True  # 5 of 16 of the second
    assert vessels.shrink_mask(mask, 2, 2).tolist() == [[False, True], [False, False]]
    random = np.random.default_rng(0).random((256, 256)) < 0.3
    share = random.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.array_equal(vessels.shrink_mask(random, 64, 64), share >= 0.3)


def test_whole_images_shrink_by_area_and_256_pixels_stay_untouched(packing: Path) -> None:
    prepare("vessels", packing)
    small = load("vessels", patch=False).sites[0]
    for row, name in enumerate(small.record["image_ids"]["train"]):
        image, mask = eye(CHASE.index(name))
        blocks = image.reshape(64, 4, 64, 4, 3).mean((1, 3)).transpose(2, 0, 1) / 255
        assert (
            np.abs(small.train.images[row].numpy() - blocks).max() <= 1.01 / 255
        )  # rounded twice, along rows and columns
        assert np.array_equal(small.train.masks[row].numpy(), mask.reshape(64, 4, 64, 4).mean((1, 3)) >= 0.3)
    shares = [eye(i)[1].mean() for i in range(len(CHASE))]
    assert small.record["foreground_at_256"] == pytest.approx(np.mean(shares))
    drawn = torch.cat([split.masks for split in (small.train, small.val, small.test)])
    assert small.record["foreground"] == pytest.approx(drawn.float().mean().item())
    for patch in (True, False):
        full = load("vessels", size=256, patch=patch).sites[0]
        image, mask = eye(CHASE.index(full.record["image_ids"]["test"][0]))
        assert np.array_equal((full.test.images[0] * 255).round().numpy(), image.transpose(2, 0, 1))
        assert np.array_equal(full.test.masks[0].numpy(), mask)


def test_originals_are_told_by_name_squeezed_and_centred(tmp_path: Path) -> None:
    path = prepare("vessels", repository(tmp_path / "download.zip"))
    stored = load_npz(path)
    assert stored["names"].tolist() == CHASE + sorted(HRF) and stored["images"].shape == (22, 256, 256, 3)
    masks = unpack(stored["mask_bits"], 256, 256)
    for name, rows, columns in (("Image_02R", (5, 251), (0, 256)), ("08_g", (42, 213), (0, 256))):
        i = stored["names"].tolist().index(name)
        inside = np.zeros((256, 256), bool)
        inside[slice(*rows), slice(*columns)] = True
        assert stored["images"][i][~inside].max() == 0 and not masks[i][~inside].any()
        _, mask = eye((CHASE + HRF).index(name), *((480, 500) if name in CHASE else (320, 480)))
        assert masks[i][inside].mean() > mask.mean()  # three tenths of a pixel are enough
        bright = stored["images"][i][..., 0] > 150
        assert masks[i][bright].mean() < 0.02  # vessels are dark: image and mask lie on each other
    assert load("vessels").sites[0].record["made_from"] == "repository"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"08_g.tif": None}, "lacks image or mask of 08_g"),
        ({"copy/08_g.tif": b"x"}, "two files for the mask of 08_g"),
        ({"08_g.tif": b"rubbish"}, r"HRF/test/mask/08_g.tif cannot be read"),
        ({"08_g.tif": png(np.zeros((10, 10), np.uint8), "TIFF")}, "image and mask of 08_g differ in size"),
        ({"../../../08_g.tif": b"x"}, "unsafe name"),
    ],
)
def test_a_flaw_of_the_originals_is_named(changes: dict[str, bytes | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=words):
        prepare("vessels", repository(tmp_path / "download.zip", **changes))


def test_a_wrong_or_damaged_archive_is_refused(archive: Path, tmp_path: Path, own_home: Path) -> None:
    other = repository(tmp_path / "other.zip", comment="0123456789")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(archive.read_bytes()[:5000])
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w") as out:
        out.comment = ID.encode()
    for path, words in (
        (archive, "corrupt or another version"),
        (other, "'0123456789', expected commit 5ed22734"),
        (broken, "no zip comment"),
        (empty, "lacks image or mask of CHASE or HRF"),
    ):
        with pytest.raises(FedloraError, match=words):
            prepare("vessels", path)
    assert not [p for p in own_home.rglob("*") if p.is_file()]


@pytest.mark.parametrize("size", [8, 60, 264])
def test_a_size_that_cannot_be_had_is_refused(size: int, packing: Path) -> None:
    for call in (lambda: prepare("vessels", packing, size), lambda: load("vessels", size=size)):
        with pytest.raises(FedloraError, match=f"no size {size}; accepted: multiples of 8 from 16 to 256"):
            call()


def test_without_the_data_the_error_says_what_to_run() -> None:
    row = next(r for r in available() if r["name"] == "vessels")
    assert row["ready"] == "run `fedlora data fetch vessels`" and row["licence"] == "CC BY 4.0"
    with pytest.raises(FedloraError, match=r"fedlora data fetch vessels.*vessels256_ccby\.npz"):
        load("vessels")


def test_a_download_takes_the_repository_through_an_interruption(
    server, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body, server.drop_after = repository(tmp_path / "download.zip").read_bytes(), [20_000]
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(vessels, "URL", server.url)
    assert fetch("vessels") == vessels.prepared(64)
    assert (own_home / vessels.REPOSITORY).read_bytes() == server.body and server.ranges == [None, "bytes=20000-"]
    vessels.prepared(64).unlink()
    assert vessels.ready() and [s.name for s in load("vessels").sites] == ["CHASE", "HRF"]
    assert len(server.ranges) == 2  # the second time from the cache


def test_the_script_says_what_shrinking_does(
    packing: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "data_scripts" / "vessels.py"
    monkeypatch.setattr(sys, "argv", ["vessels.py", "--from", str(packing), "--size", "32"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "tiles (patch=True) of 32 pixels" in printed and "whole images (patch=False) of 32 pixels" in printed
    assert printed.count("foreground of HRF: ") == 2 and "CC BY 4.0" in printed
    monkeypatch.setattr(sys, "argv", ["vessels.py", "--from", str(own_home / "nothing")])
    with pytest.raises(SystemExit, match="no file"):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_the_real_images_are_what_the_file_says(real_data: Path) -> None:
    tiles, shrunk = (load("vessels", patch=patch) for patch in (True, False))
    assert [s.record["images"] for s in tiles.sites] == [28, 42]
    assert [s.record["people"] for s in tiles.sites] == [14, 23]
    assert [round(s.record["foreground_at_256"], 3) for s in shrunk.sites] == [0.077, 0.059]
    assert [round(s.record["foreground"], 3) for s in shrunk.sites] == [0.112, 0.079]
    stored = load_npz(vessels.prepared(64))
    masks, names = unpack(stored["mask_bits"], 256, 256), stored["names"].tolist()
    for site, ceiling, kept in zip(tiles.sites, (0.63, 0.48), (0.94, 1.0), strict=True):
        assert sum(site.sizes().values()) == 12 * site.record["images"]
        own = masks[[i for i, name in enumerate(names) if vessels.site_of(name) == site.name]]
        drawn = sum(int(split.masks.sum()) for split in (site.train, site.val, site.test))
        assert drawn / own.sum() == pytest.approx(kept, abs=0.006)
        large = [vessels.shrink_mask(mask, 64, 64).repeat(4, 0).repeat(4, 1) for mask in own]
        dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(large, own.astype(bool), strict=True)]
        assert np.mean(dice) == pytest.approx(ceiling, abs=0.006)


@pytest.mark.slow
def test_the_real_neighbours_of_hrf_look_like_two_eyes_of_one_person(real_data: Path) -> None:
    load("vessels", size=16)
    stored = load_npz(vessels.prepared(64))
    masks = unpack(stored["mask_bits"], 256, 256)
    side, colour, people = {}, {}, defaultdict(list)
    for i, name in enumerate(stored["names"].tolist()):
        if vessels.site_of(name) == "HRF":
            people[vessels.person(name)].append(name)
            columns = np.convolve(masks[i].sum(0), np.ones(24), "same")
            side[name] = "left" if columns.argmax() < 128 else "right"  # vessels crowd at the optic disc
            image = stored["images"][i]
            colour[name] = image[image.max(2) > 40].mean(0)
    pairs = [pair for pair in people.values() if len(pair) == 2]
    assert len(pairs) == 19 and all(side[a] != side[b] for a, b in pairs)
    own = [np.linalg.norm(colour[a] - colour[b]) for a, b in pairs]
    paired = {frozenset(pair) for pair in pairs}
    strangers = [
        np.linalg.norm(colour[a] - colour[b])
        for a in colour
        for b in colour
        if a < b and a[3:] == b[3:] and side[a] != side[b] and frozenset((a, b)) not in paired
    ]
    assert np.median(own) < 0.6 * np.median(strangers)


def test_the_real_packing_is_known_by_its_digest(real_data: Path) -> None:
    assert hashlib.sha256((real_data / vessels.ARCHIVE).read_bytes()).hexdigest() == vessels.FILE_SHA256
