"""Low-grade glioma: raw slices give the prepared file bit for bit, patients stay in one split, Kaggle needs a login."""

import hashlib
import io
import re
import runpy
import sys
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora_mini.data import fetch, lgg, load, options, prepare, shift_table
from fedlora_mini.data.registry import available
from fedlora_mini.errors import FedloraError

PATIENTS = {"CS": ("4941", "4942", "5393"), "DU": ("5849", "A5TT", "7008", "7300"), "EZ": ("7264",)}
PATIENTS |= {"FG": ("5962", "6688", "A60K"), "HT": ("7473", "7602", "8113", "A61B")}
SLICES = (8, 9, 10, 11, 12)  # 8 holds no tumour; as text 10 comes before 9


def tif(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF")
    return buffer.getvalue()


def raw_slice(site: str, patient: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in three channels (256, 256, 3), the middle one brighter inside the tumour; and the tumour."""
    rng = np.random.default_rng([*f"{site}{patient}".encode(), number])
    y, x = np.indices((256, 256))
    tumour = ((y - rng.integers(80, 170)) ** 2 + (x - rng.integers(80, 170)) ** 2 < 35**2) & (number != 8)
    image = rng.integers(0, 90, (256, 256, 3), dtype=np.uint8)
    image[tumour, 1] += 130
    return image, tumour


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    out = {"kaggle_3m/README.md": b"about", "kaggle_3m/data.csv": b"Patient,RNASeqCluster"}
    for site, patients in PATIENTS.items():
        for patient in patients:
            case = f"TCGA_{site}_{patient}_19970222"
            for number in SLICES:
                image, tumour = raw_slice(site, patient, number)
                out[f"kaggle_3m/{case}/{case}_{number}.tif"] = tif(image)
                out[f"kaggle_3m/{case}/{case}_{number}_mask.tif"] = tif((tumour * 255).astype(np.uint8))
    return out


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def halved(grey: np.ndarray) -> np.ndarray:
    """The triangle filter at half the size, (1 3 3 1) / 8 with the weights renewed at the edges, rounded by axis."""
    for axis in (1, 0):
        padded = np.pad(np.moveaxis(grey, axis, 0).astype(float), [(1, 1), (0, 0)])
        weight = np.pad(np.ones(len(grey)), 1)
        taps = [(k, w) for k, w in enumerate((1, 3, 3, 1))]
        total = sum(w * padded[k : k + 2 * 127 + 1 : 2] for k, w in taps)
        share = sum(w * weight[k : k + 2 * 127 + 1 : 2] for k, w in taps)
        grey = np.moveaxis(np.floor(total / share[:, None] + 0.5), 0, axis)
    return grey


@pytest.fixture(scope="module")
def archive(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Kaggle packs it: the same folder a second time inside another one."""
    copy = {f"lgg-mri-segmentation/{name}": data for name, data in files.items() if "_CS_" in name}
    return write_zip(tmp_path_factory.mktemp("archive") / "archive.zip", files | copy)


@pytest.fixture(scope="module")
def content(archive: Path) -> str:
    return lgg.slices_digest(lgg.read_slices(archive))


@pytest.fixture
def small(archive: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lgg, "CONTENT_SHA256", content)
    return archive


def refused(path: Path | str, words: str) -> None:
    with pytest.raises(FedloraError, match=words):
        prepare("lgg", path)


def test_raw_slices_with_tumour_come_in_the_order_of_their_names(archive: Path) -> None:
    data = lgg.read_slices(archive)
    owners = list(zip(data["site"].tolist(), data["patient"].tolist(), strict=True))
    assert owners == [(s, p) for s in sorted(PATIENTS) for p in sorted(PATIENTS[s]) for _ in range(4)]
    for row, (site, patient) in enumerate(owners):
        image, tumour = raw_slice(site, patient, (10, 11, 12, 9)[row % 4])
        assert np.array_equal(data["mask"][row], tumour[1::2, 1::2])
        assert np.abs(data["image"][row] - halved(image[..., 1])).max() <= 1
        assert np.abs(data["image"][row] - halved(image[..., 0])).max() > 100  # not another channel


def test_a_zip_a_folder_and_the_prepared_file_are_the_same_data(small: Path, tmp_path: Path) -> None:
    first = lgg.read_slices(small)
    with zipfile.ZipFile(small) as archive:
        archive.extractall(tmp_path / "set")
    packed = {**first, "mask": np.packbits(first["mask"], axis=-1)}
    np.savez(tmp_path / "lgg_flair128.npz", **packed)
    for path in (tmp_path / "set", tmp_path / "set" / "kaggle_3m", tmp_path / "lgg_flair128.npz", tmp_path):
        assert prepare("lgg", path) == lgg.prepared(64)
    again = lgg.read_slices(tmp_path / "lgg_flair128.npz")
    assert all(np.array_equal(first[key], again[key]) for key in first)
    packed["mask"][3, 40, 5] ^= 1
    np.savez(tmp_path / "other.npz", **packed)
    refused(tmp_path / "other.npz", "another version")
    np.savez(tmp_path / "other.npz", image=first["image"], site=first["site"])
    refused(tmp_path / "other.npz", "lacks mask, patient")


def test_institutions_are_sites_and_grey_is_copied(small: Path) -> None:
    for size in (64, 128):
        prepare("lgg", small, size)
        data = load("lgg", size=size)
        assert [s.name for s in data.sites] == ["DU", "HT", "FG", "CS"] and [s.name for s in data.unseen] == ["EZ"]
        assert data.classes == ("background", "tumour") and data.channels == 3 and data.spatial == (size, size)
        for site in (*data.sites, *data.unseen):
            for part in ("train", "test"):
                split = getattr(site, part)
                assert torch.equal(split.images[:, 0], split.images[:, 1]) and split.masks.unique().tolist() == [0, 1]
                inside, outside = (split.images[:, 0][split.masks == k].mean() for k in (1, 0))
                assert inside > outside + 0.4  # the masks lie on their own images
            assert set(site.record["empty_masks"].values()) == {0}
    assert "CC BY-NC-SA 4.0" in data.licence and "Buda" in data.licence and "single patient" in data.note
    assert options("lgg") == {"test_seed": None} and list(shift_table(data).index) == ["DU", "HT", "FG", "CS", "EZ"]


def test_smaller_slices_average_and_ask_the_majority(small: Path) -> None:
    full = lgg.read_slices(small)
    with np.load(prepare("lgg", small, 64), allow_pickle=False) as stored:
        grey = full["image"].reshape(-1, 64, 2, 64, 2).mean((2, 4))
        share = full["mask"].reshape(-1, 64, 2, 64, 2).mean((2, 4))
        assert np.abs(stored["images"] - grey).max() <= 1
        assert np.array_equal(np.unpackbits(stored["mask_bits"], axis=1).reshape(share.shape), share >= 0.5)


def test_a_patient_is_in_one_split_and_the_seed_decides(small: Path) -> None:
    prepare("lgg", small, 16)
    seen = set()
    for seed in range(6):
        data, again = (load("lgg", size=16, seed=seed) for _ in range(2))
        for site, same in zip(data.sites, again.sites, strict=True):
            assert site.record == same.record and torch.equal(site.test.images, same.test.images)
            parts = [list(part) for part in site.record["patients"].values()]
            assert sorted(patient for part in parts for patient in part) == sorted(PATIENTS[site.name]) and all(parts)
            assert [sum(p.values()) for p in site.record["patients"].values()] == [*site.sizes().values()]
        seen.add(str([site.record["patients"] for site in data.sites]))
        assert data.unseen[0].sizes() == {"train": 2, "val": 0, "test": 2}
    assert len(seen) > 1


def test_the_one_patient_of_ez_cannot_train_and_another_institution_can_be_held_out(small: Path) -> None:
    prepare("lgg", small, 16)
    data = load("lgg", size=16, unseen="CS")
    assert [s.name for s in data.sites] == ["DU", "HT", "FG"] and [s.name for s in data.unseen] == ["CS"]
    with pytest.raises(FedloraError, match="site 'EZ' of 'lgg' has an empty val split"):
        load("lgg", size=16, sites="EZ")
    with pytest.raises(FedloraError, match=r"unknown site 'CX'.*Did you mean"):
        load("lgg", size=16, sites="CX")


def test_a_wrong_archive_is_refused(
    files: dict[str, bytes], small: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "kaggle_3m/TCGA_FG_6688_19970222/TCGA_FG_6688_19970222"
    path = tmp_path / "other.zip"
    less = write_zip(path, {name: data for name, data in files.items() if "_FG_6688_" not in name})
    refused(less, "incomplete, corrupt or another version: 56 slices of 14 patients")
    refused(write_zip(path, files | {f"{case}_9_mask.tif": files[f"{case}_10_mask.tif"]}), "another version")
    refused(write_zip(path, {n: d for n, d in files.items() if n != f"{case}_9.tif"}), "_9_mask.tif has no twin")
    refused(write_zip(path, files | {f"{case}_9.tif": files[f"{case}_9.tif"][:900]}), "_9.tif cannot be read")
    refused(write_zip(path, files | {f"{case}_9.tif": tif(np.zeros((64, 64, 3), np.uint8))}), "differ in size")
    refused(write_zip(path, {"kaggle_3m/README.md": b"about"}), "holds no tumour slice; expected kaggle_3m/TCGA")
    refused(write_zip(path, files | {"kaggle_3m/../../a.tif": b"x"}), "unsafe name")
    body = bytearray(small.read_bytes())
    body[body.index(files[f"{case}_9_mask.tif"]) + 3000] ^= 255
    path.write_bytes(body)
    refused(path, "Bad CRC-32")
    path.write_bytes(body[:50_000])
    refused(path, "neither a readable npz nor a readable zip")
    assert not list(own_home.rglob("*.npz"))
    monkeypatch.setattr(lgg, "FILE_SHA256", hashlib.sha256(less.read_bytes()).hexdigest())
    lgg.verify(less)  # the file's own digest is enough


def test_without_the_data_the_error_tells_of_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(r for r in available() if r["name"] == "lgg")
    assert row["licence"] == "CC BY-NC-SA 4.0" and row["kind"] == "real" and "fetch lgg" in row["ready"]
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("nothing may be downloaded"))
    with pytest.raises(FedloraError, match=r"account at Kaggle.*lgg-mri-segmentation.*lgg.py --from"):
        fetch("lgg")
    with pytest.raises(FedloraError, match=r"Kaggle gives it only to those who log in.*lgg.py --from"):
        load("lgg")


def test_the_script_takes_an_address_through_an_interruption(
    small: Path, server, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body, server.drop_after = small.read_bytes(), [2_000_000]
    monkeypatch.setattr("time.sleep", lambda _: None)
    script = Path(__file__).parents[2] / "data_scripts" / "lgg.py"
    monkeypatch.setattr(sys, "argv", ["lgg.py", "--from", server.url])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "DU Henry Ford Hospital: 16 slices of 4 patients, 0 empty masks" in printed
    assert "EZ University of North Carolina: 4 slices of 1 patients" in printed and "CC BY-NC-SA 4.0" in printed
    assert (own_home / lgg.ARCHIVE).read_bytes() == server.body and server.ranges == [None, "bytes=2000000-"]
    assert fetch("lgg") == lgg.prepared(64)
    monkeypatch.setattr(sys, "argv", ["lgg.py", "--from", str(own_home / "nothing")])
    with pytest.raises(SystemExit, match="no file"):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_nine_raw_patients_give_what_the_prepared_file_holds(real_data: Path) -> None:
    sample = real_data / "lgg" / "kaggle_3m_sample.zip"
    if not sample.is_file():
        pytest.skip("the local copy of the data sets holds no sample of kaggle_3m")
    raw = lgg.read_slices(sample)
    with np.load(real_data / lgg.ARCHIVE) as stored:
        chosen = np.isin(stored["patient"], raw["patient"])
        assert chosen.sum() == len(raw["image"]) == 73 and len(set(raw["patient"].tolist())) == 9
        for key in ("site", "patient", "image"):
            assert np.array_equal(stored[key][chosen], raw[key])
        assert np.array_equal(np.unpackbits(stored["mask"][chosen], axis=-1), raw["mask"])
    with pytest.raises(FedloraError, match=r"73 slices of 9 patients.*expected 1,373 of 110"):
        lgg.verify(sample)
    with zipfile.ZipFile(sample) as archive:  # an independent walk: PIL per file, tumour pixels by patient
        area: dict[str, int] = defaultdict(int)
        for name in archive.namelist():
            if name.endswith("_mask.tif"):
                patient = re.findall(r"TCGA_\w\w_(\w{4})_", name)[0]
                area[patient] += int((np.asarray(Image.open(archive.open(name)))[1::2, 1::2] > 0).sum())
    assert area == {p: int(raw["mask"][raw["patient"] == p].sum()) for p in area}


@pytest.mark.slow
def test_the_real_institutions_have_their_patients_whole(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = real_data / lgg.ARCHIVE
    if not path.is_file():
        pytest.skip("the local copy of the data sets holds no glioma slices")
    lgg.verify(path)
    monkeypatch.setattr(lgg, "FILE_SHA256", "so that the content is checked")
    data = load("lgg")
    sites = {s.name: s for s in (*data.sites, *data.unseen)}
    assert {n: s.record["slices"] for n, s in sites.items()} == {"DU": 624, "HT": 404, "FG": 218, "CS": 121, "EZ": 6}
    people = {n: len(set().union(*s.record["patients"].values())) for n, s in sites.items()}
    assert people == {"DU": 45, "HT": 34, "FG": 14, "CS": 16, "EZ": 1}
    assert sites["EZ"].sizes() == {"train": 3, "val": 0, "test": 3}
    empty = {n: sum(s.record["empty_masks"].values()) for n, s in sites.items()}
    assert empty == {"DU": 0, "HT": 0, "FG": 1, "CS": 0, "EZ": 0}  # one pixel at 128 is none at 64
    for site in data.sites:
        parts = [set(part) for part in site.record["patients"].values()]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert 0.6 < len(site.train) / site.record["slices"] < 0.8
    with np.load(path) as stored:
        raw = stored["image"][stored["patient"] == next(iter(sites["HT"].record["patients"]["test"]))]
    assert (
        np.abs(sites["HT"].test.images[0, 2].numpy() * 255 - raw[0].reshape(64, 2, 64, 2).mean((1, 3))).max() <= 1.001
    )
    shares = torch.stack([s.train.masks.float().mean() for s in data.sites])
    assert shares.max() < 0.05 and shares.min() > 0.02
