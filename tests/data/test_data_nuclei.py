"""Nuclei: verified, tiled by a written rule, split by image; on a small archive made here and on the real one."""

import io
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora_mini.data import fetch, load, nuclei, prepare
from fedlora_mini.data.fetch import content_digest
from fedlora_mini.data.registry import available
from fedlora_mini.errors import FedloraError

SHAPES = {
    "fluo256": (256, 256),
    "he": (256, 320),
    "fluo360": (360, 360),
    "fluo520": (520, 696),
    "fluo-other": (260, 347),
}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five domains of four images with two discs each, packed as the public archive is, below a repository folder."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("archive") / "download.zip"
    with zipfile.ZipFile(path, "w") as out:
        for domain, (height, width) in SHAPES.items():
            for i in range(4):
                image = np.full((height, width, 4), 20 + 10 * i, np.uint8)
                image[..., 3] = 255
                if domain == "he":
                    image[..., 0] += 60
                y, x = np.indices((height, width))
                folder = f"fixes-3035455/stage1_train/{domain}{i}"
                for k in range(2):
                    disc = (y - rng.uniform(80, height - 80)) ** 2 + (x - rng.uniform(80, width - 80)) ** 2 < 30**2
                    image[disc, :3] = 200
                    out.writestr(f"{folder}/masks/{k}.png", png((disc * 255).astype(np.uint8)))
                out.writestr(f"{folder}/images/{domain}{i}.png", png(image))
        out.writestr("fixes-3035455/README.rst", "corrections")
    return path


@pytest.fixture
def small(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nuclei, "CONTENT_SHA256", content_digest(archive, "stage1_train", ".png"))
    return archive


def test_domains_become_sites_split_by_image(small: Path) -> None:
    prepare("nuclei", small)
    data = load("nuclei")
    assert [s.name for s in data.sites] == ["fluo256", "he", "fluo360", "fluo520"]
    assert [s.name for s in data.unseen] == ["fluo-other"]
    assert data.classes == ("background", "nucleus") and data.channels == 3 and data.spatial == (64, 64)
    assert "not hospitals" in data.note and "CC0" in data.licence
    for site in (*data.sites, *data.unseen):
        ids = site.record["image_ids"]
        assert not (set(ids["train"]) & set(ids["test"]) or set(ids["train"]) & set(ids["val"]))
        assert len(ids["train"]) + len(ids["val"]) + len(ids["test"]) == 4
        assert len(site.train) <= 4 * len(ids["train"])


@pytest.mark.slow
def test_preparing_twice_gives_the_same_bytes_and_no_pickle(small: Path) -> None:
    first = nuclei.tile_archive(small, 64)
    again = nuclei.tile_archive(small, 64)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    with np.load(prepare("nuclei", small), allow_pickle=False) as stored:
        assert np.array_equal(stored["mask_bits"], first["mask_bits"])


def test_tiles_are_cut_by_the_written_rule() -> None:
    mask = np.zeros((520, 696), bool)
    mask[4:132, 28:156] = True  # the first tile of the centred grid
    mask[132:260, 28 : 28 + 128][:12, :12] = True  # 0.9 % of the second: not enough
    assert nuclei.choose_tiles(mask, "x") == [(4, 28)]
    everything = nuclei.choose_tiles(np.ones((520, 696), bool), "x")
    assert len(everything) == 4 == len(set(everything)) and everything == nuclei.choose_tiles(
        np.ones((520, 696), bool), "x"
    )
    assert everything != nuclei.choose_tiles(np.ones((520, 696), bool), "another image")
    assert nuclei.choose_tiles(np.zeros((256, 256), bool), "x") == []


def test_images_and_masks_of_a_tile_fit_and_any_size_can_be_prepared(small: Path) -> None:
    for size in (64, 128):
        prepare("nuclei", small, size)
        for site in load("nuclei", size=size).sites:
            bright = site.train.images[:, 1] > 0.6  # the discs are painted at 200 / 255
            assert ((bright == (site.train.masks == 1)).float().mean()) > 0.98


def test_another_seed_splits_otherwise(small: Path) -> None:
    prepare("nuclei", small)
    ids = [load("nuclei", seed=s).sites[0].record["image_ids"]["test"] for s in range(6)]
    assert ids[0] == load("nuclei", seed=0).sites[0].record["image_ids"]["test"]
    assert len({str(i) for i in ids}) > 1


def test_a_wrong_archive_is_refused(archive: Path, tmp_path: Path, own_home: Path) -> None:
    with pytest.raises(FedloraError, match="corrupt or another version"):
        prepare("nuclei", archive)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(FedloraError, match="not a readable zip"):
        prepare("nuclei", broken)
    assert not list(own_home.rglob("*.npz"))


def test_without_the_data_the_error_says_what_to_run() -> None:
    assert next(r for r in available() if r["name"] == "nuclei")["ready"] == "run `fedlora data fetch nuclei`"
    with pytest.raises(FedloraError, match="fedlora data fetch nuclei"):
        load("nuclei")


def test_a_damaged_prepared_file_says_so(own_home: Path) -> None:
    path = nuclei.prepared(64)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 not an npz")
    with pytest.raises(FedloraError, match="damaged"):
        load("nuclei")


def test_the_script_downloads_through_an_interruption(
    small: Path, server, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body, server.drop_after = small.read_bytes(), [20_000]
    monkeypatch.setattr("time.sleep", lambda _: None)
    script = Path(__file__).parents[2] / "data_scripts" / "nuclei.py"
    monkeypatch.setattr(sys, "argv", ["nuclei.py", "--from", server.url])
    runpy.run_path(str(script), run_name="__main__")
    assert "fluo256" in capsys.readouterr().out
    assert (own_home / "nuclei" / "stage1_train.zip").read_bytes() == server.body
    assert server.ranges == [None, "bytes=20000-"]
    assert fetch("nuclei") == nuclei.prepared(64)
    monkeypatch.setattr(sys, "argv", ["nuclei.py", "--from", str(own_home / "nothing")])
    with pytest.raises(SystemExit, match="no file"):
        runpy.run_path(str(script), run_name="__main__")


def test_the_real_archive_is_accepted_by_either_digest(real_data: Path) -> None:
    path = real_data / nuclei.ARCHIVE
    nuclei.verify(path)


@pytest.mark.slow
def test_the_real_archive_gives_four_domains_without_leakage(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nuclei, "FILE_SHA256", "so that the content is checked")
    data = load("nuclei")
    assert [s.record["images"] for s in (*data.sites, *data.unseen)] == [
        333,
        107,
        90,
        90,
        16,
        26,
    ]  # two images have no tile with 1 % of nuclei
    assert [s.name for s in data.unseen] == ["brightfield", "fluo-other"]
    means = [s.statistics()["intensity_mean"] for s in data.sites]
    assert max(means) > 10 * min(means)
    for site in (*data.sites, *data.unseen):
        parts = [set(v) for v in site.record["image_ids"].values()]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert torch.isfinite(site.train.images).all()
