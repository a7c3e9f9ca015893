"""Lung nodules of four raters: targets by votes, agreement against MONAI, both kinds of archive, splits by patient."""

import io
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance
from PIL import Image
from torch import Tensor

from fedlora_mini.data import fetch, lidc, load, options, prepare
from fedlora_mini.data.fetch import sha256
from fedlora_mini.data.registry import available
from fedlora_mini.errors import FedloraError

NODULES = [f"LIDC-IDRI-{patient:04d}/nodule-{k}" for patient in range(1, 9) for k in range(1 + patient % 3)]


def drawn(number: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A grey slice (128, 128) with a bright disc, and four raters' discs (4, 128, 128) of it."""
    rng = np.random.default_rng(number)
    y, x = np.indices((128, 128))
    image = rng.integers(0, 90, (128, 128), dtype=np.uint8)
    masks = []
    for _ in range(4):
        centre, radius = 63.5 + rng.uniform(-2, 2, 2), scale * rng.uniform(6, 10)
        masks.append((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2)
    image[np.mean(masks, 0) >= 0.5] = 200
    return image, np.stack(masks)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def repository(path: Path, comment: str = lidc.COMMIT, **changes: bytes) -> Path:
    """Slices 9, 10 (the largest) and 11 of every nodule; on a larger slice 12 the fourth rater drew nothing."""
    files: dict[str, bytes] = {"README.md": b"", "LICENSE": b""}
    for i, nodule in enumerate(NODULES):
        for k, scale in ((9, 0.8), (10, 1.0), (11, 0.8), (12, 1.3)):
            image, masks = drawn(i, scale)
            files[f"{nodule}/images/slice-{k}.png"] = png(image)
            for r, mask in enumerate(masks):
                if (k, r) != (12, 3):
                    files[f"{nodule}/mask-{r}/slice-{k}.png"] = png(mask.astype(np.uint8) * 255)
        files[f"{nodule}/images/slice-13.png"] = files[f"{nodule}/images/slice-10.png"]
        for r in range(4):  # drawn on by all, but one mask is empty
            files[f"{nodule}/mask-{r}/slice-13.png"] = png(np.full((128, 128), 255 * (r > 0), np.uint8))
    files |= changes
    with zipfile.ZipFile(path, "w") as out:
        out.comment = comment.encode()
        for name, data in files.items():
            out.writestr(f"Pulmoseg-{lidc.COMMIT}/{'' if name.count('/') == 0 else lidc.FOLDER + '/'}{name}", data)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [drawn(i) for i in range(len(NODULES))]
    bits = np.packbits(np.stack([masks for _, masks in pairs]).reshape(len(pairs), 4, -1), axis=2)
    names = np.array([f"{nodule}/10" for nodule in NODULES])
    path = tmp_path_factory.mktemp("packing") / "any name.npz"
    np.savez_compressed(path, image=np.stack([image for image, _ in pairs]), mask_bits=bits, name=names)
    return path


@pytest.fixture
def packing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lidc, "FILE_SHA256", sha256(archive))
    return archive


def test_one_site_split_by_patient(packing: Path) -> None:
    prepare("lidc", packing)
    splits = set()
    for seed in range(6):
        data = load("lidc", seed=seed)
        assert [s.name for s in data.sites] == ["lidc"] and not data.unseen
        assert data.classes == ("background", "nodule") and data.channels == 3 and data.spatial == (64, 64)
        site = data.sites[0]
        parts = [set(part) for part in site.record["patients"].values()]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert set().union(*parts) == {nodule.split("/")[0] for nodule in NODULES}
        assert sum(site.sizes().values()) == len(NODULES) and all(site.sizes().values())
        owners = {
            name: [n for n in NODULES if n.split("/")[0] in site.record["patients"][name]] for name in ("val", "test")
        }
        assert all(len(getattr(site, name)) == len(owned) for name, owned in owners.items())
        splits.add(str(site.record["patients"]))
    assert len(splits) > 1 and "CC BY 3.0" in data.licence and "no clients" in data.note


def test_the_outlines_come_out_as_they_were_drawn(packing: Path) -> None:
    prepare("lidc", packing, 128)
    images, masks, patients = lidc.raters()
    assert images.shape == (len(NODULES), 1, 128, 128) and masks.dtype == torch.uint8
    assert patients == [nodule.split("/")[0] for nodule in NODULES]
    for i in range(len(NODULES)):
        image, four = drawn(i)
        assert np.array_equal((images[i, 0] * 255).round().numpy(), image)
        assert np.array_equal(masks[i].numpy(), four)


def test_half_the_size_averages_images_and_keeps_what_is_covered_by_half(packing: Path) -> None:
    prepare("lidc", packing)
    images, masks, _ = lidc.raters(64)
    for i in range(len(NODULES)):
        image, four = drawn(i)
        blocks = image.reshape(64, 2, 64, 2).mean((1, 3)) / 255
        assert np.abs(images[i, 0].numpy() - blocks).max() <= 1.01 / 255  # rounded twice, along rows and columns
        assert np.array_equal(masks[i].numpy(), four.reshape(4, 64, 2, 64, 2).mean((2, 4)) >= 0.5)


@pytest.mark.parametrize("target", lidc.TARGETS)
def test_a_target_is_what_so_many_raters_drew(target: str, packing: Path) -> None:
    assert options("lidc") == {"target": "majority", "test_seed": None}
    prepare("lidc", packing, 128)
    site = load("lidc", size=128, target=target).sites[0]
    rows = [i for i, nodule in enumerate(NODULES) if nodule.split("/")[0] in site.record["patients"]["train"]]
    for row, i in enumerate(rows):
        votes = drawn(i)[1].sum(0)
        wanted = {"majority": votes >= 2, "union": votes >= 1, "intersection": votes == 4}
        if target in wanted:
            assert np.array_equal(site.train.masks[row].numpy(), wanted[target])
        else:
            assert np.array_equal(site.train.masks[row].numpy(), drawn(i)[1][int(target.removeprefix("rater"))])
    assert site.record["target"] == target and site.record["empty_masks"] == 0 and len(rows) == len(site.train)


def test_an_empty_intersection_is_counted(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = dict(np.load(archive))
    apart = np.zeros((4, 128, 128), bool)
    for r in range(4):
        apart[r, 20 * r : 20 * r + 9, 50:60] = True
    arrays["mask_bits"][2] = np.packbits(apart.reshape(4, -1), axis=1)
    path = tmp_path / "apart.npz"
    np.savez(path, **arrays)
    monkeypatch.setattr(lidc, "FILE_SHA256", sha256(path))
    prepare("lidc", path)
    assert load("lidc", target="intersection").sites[0].record["empty_masks"] == 1
    assert load("lidc", target="union").sites[0].record["empty_masks"] == 0


def test_an_unknown_target_is_named_with_those_there_are(packing: Path) -> None:
    with pytest.raises(FedloraError, match="unknown target 'rater4'; accepted: intersection, majority, rater0"):
        load("lidc", target="rater4")


def masks_of(seed: int) -> Tensor:
    return torch.from_numpy(np.stack([drawn(100 * seed + i)[1] for i in range(5)])).to(torch.uint8)


def test_agreement_equals_monai_and_a_count_by_hand() -> None:
    masks = masks_of(1)
    masks[4, :, :, :62] = 0  # parts of discs, with a straight edge
    masks[3] = masks[3].roll((60, -60), (1, 2))  # at the edge of the image
    found = lidc.agreement(masks)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for n, four in enumerate(masks.numpy().astype(bool)):
        for p, (i, j) in enumerate(pairs):
            overlap = 2 * np.logical_and(four[i], four[j]).sum() / (four[i].sum() + four[j].sum())
            assert found["dice"][n, p] == pytest.approx(overlap)
            one, other = (torch.from_numpy(four[k])[None, None].float() for k in (i, j))
            distance = compute_average_surface_distance(one, other, include_background=True, symmetric=True)
            assert found["distance"][n, p] == pytest.approx(distance.item(), abs=1e-5)
            assert found["dice_matrix"][i, j] == found["dice_matrix"][j, i] == pytest.approx(found["dice"][:, p].mean())
    areas = masks.flatten(2).sum(2).double()
    assert torch.allclose(found["ratio"].double(), areas.amax(1) / areas.amin(1))
    assert torch.allclose(found["area"].double(), areas.mean(0) / areas.mean())
    assert found["twice"] == pytest.approx(sum(bool(row.max() > 2 * row.min()) for row in areas) / len(areas))
    assert torch.equal(found["dice_matrix"].diag(), torch.ones(4))


def test_agreement_of_squares_drawn_by_hand() -> None:
    masks = torch.zeros(2, 3, 20, 20)
    masks[0, 0, 5:9, 5:9] = masks[0, 1, 5:9, 5:9] = masks[0, 2, 4:10, 4:10] = 1  # 4 x 4 twice, 6 x 6 around it
    masks[1, 0, 5:9, 5:9] = 1
    found = lidc.agreement(masks)
    assert found["dice"][0].tolist() == pytest.approx([1.0, 2 * 16 / 52, 2 * 16 / 52])
    assert found["distance"][0, 0] == 0 and 1 < found["distance"][0, 1] < 2**0.5
    assert found["ratio"].tolist() == [36 / 16, float("inf")] and found["twice"] == 1.0
    assert found["dice"][1].tolist() == [0.0, 0.0, 1.0]  # nobody but the first drew anything
    assert found["distance"][1].isnan().all()
    assert lidc.agreement(torch.zeros(1, 4, 9, 9))["dice"].tolist() == [[1.0] * 6]


def test_raters_who_move_the_outline_by_a_pixel_are_a_pixel_apart() -> None:
    y, x = np.indices((128, 128)) - 63.5
    radius = np.hypot(y, x)
    discs = torch.from_numpy(np.stack([radius <= r for r in (20, 21, 23)]))[None].to(torch.uint8)
    near, far, middle = lidc.agreement(discs)["distance"][0].tolist()
    assert (near, far, middle) == pytest.approx((1, 3, 2), abs=0.15)


def test_the_repository_gives_the_largest_slice_that_all_four_drew_on(packing: Path, tmp_path: Path) -> None:
    images, masks, names = lidc.read_repository(repository(tmp_path / "download.zip"))
    packed = lidc.read_packing(packing)
    assert names == packed[2] and np.array_equal(images, packed[0]) and np.array_equal(masks, packed[1])
    prepare("lidc", tmp_path / "download.zip")
    assert load("lidc").sites[0].record["made_from"] == "repository"


def test_the_repository_is_sorted_as_a_reader_counts(tmp_path: Path) -> None:
    image, masks = drawn(0)
    extra = {"LIDC-IDRI-0001/nodule-10/images/slice-2.png": png(image)}
    extra |= {
        f"LIDC-IDRI-0001/nodule-10/mask-{r}/slice-2.png": png(m.astype(np.uint8) * 255) for r, m in enumerate(masks)
    }
    names = lidc.read_repository(repository(tmp_path / "download.zip", **extra))[2]
    assert names[:4] == [f"LIDC-IDRI-0001/nodule-{k}" for k in ("0/10", "1/10", "10/2")] + [
        "LIDC-IDRI-0002/nodule-0/10"
    ]


def test_a_wrong_or_damaged_archive_is_refused(archive: Path, tmp_path: Path, own_home: Path) -> None:
    first = f"{NODULES[0]}/images/slice-10.png"
    broken = tmp_path / "broken.npz"
    broken.write_bytes(archive.read_bytes()[:5000])
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w") as out:
        out.comment = lidc.COMMIT.encode()
    for path, words in (
        (archive, "corrupt or another version"),
        (broken, "no zip comment"),
        (repository(tmp_path / "other.zip", comment="21aa24"), "'21aa24', expected commit 045c0c6b"),
        (empty, "holds no slice"),
        (repository(tmp_path / "a.zip", **{first: b"rubbish"}), "images/slice-10.png cannot be read"),
        (
            repository(tmp_path / "b.zip", **{first: png(np.zeros((512, 512), np.uint8))}),
            r"\(512, 512\) pixels, expected",
        ),
        (repository(tmp_path / "c.zip", **{f"../../{first}": b"x"}), "unsafe name"),
    ):
        with pytest.raises(FedloraError, match=words):
            prepare("lidc", path)
    assert not [p for p in own_home.rglob("*") if p.is_file()]


@pytest.mark.parametrize("size", [8, 60, 136])
def test_a_size_that_cannot_be_had_is_refused(size: int, packing: Path) -> None:
    for call in (lambda: prepare("lidc", packing, size), lambda: load("lidc", size=size), lambda: lidc.raters(size)):
        with pytest.raises(FedloraError, match=f"no size {size}; accepted: multiples of 8 from 16 to 128"):
            call()


def test_without_the_data_the_error_says_what_to_run() -> None:
    row = next(r for r in available() if r["name"] == "lidc")
    assert row["ready"] == "run `fedlora data fetch lidc`" and row["licence"] == "CC BY 3.0"
    for call in (lambda: load("lidc"), lambda: lidc.raters(64)):
        with pytest.raises(FedloraError, match=r"fedlora data fetch lidc.*lidc128_4raters\.npz"):
            call()


def test_a_download_takes_the_repository_through_an_interruption(
    server, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body, server.drop_after = repository(tmp_path / "download.zip").read_bytes(), [20_000]
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(lidc, "URL", server.url)
    assert fetch("lidc") == lidc.prepared(64)
    assert (own_home / lidc.REPOSITORY).read_bytes() == server.body and server.ranges == [None, "bytes=20000-"]
    lidc.prepared(64).unlink()
    assert lidc.ready() and len(lidc.raters(64)[2]) == len(NODULES)
    assert len(server.ranges) == 2  # the second time from the cache


def test_the_script_says_how_far_the_raters_differ(
    packing: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "data_scripts" / "lidc.py"
    monkeypatch.setattr(sys, "argv", ["lidc.py", "--from", str(packing), "--size", "64"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    found = lidc.agreement(lidc.raters(64)[1])
    assert f"{len(NODULES)} slices of 8 patients" in printed and "CC BY 3.0" in printed
    assert f"Dice of two raters: {found['dice'].mean():.3f}" in printed
    monkeypatch.setattr(sys, "argv", ["lidc.py", "--from", str(own_home / "nothing")])
    with pytest.raises(SystemExit, match="no file"):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_the_real_raters_differ_as_the_file_says(real_data: Path) -> None:
    lidc.verify(real_data / lidc.ARCHIVE)
    _, masks, patients = lidc.raters()
    found = lidc.agreement(masks)
    assert masks.shape == (833, 4, 128, 128) and len(set(patients)) == 527
    assert masks.flatten(2).sum(2).min() > 0  # all four drew on every slice
    assert found["dice"].mean() == pytest.approx(0.833, abs=5e-4)
    assert found["distance"].median() == pytest.approx(0.77, abs=5e-3)
    assert found["twice"] == pytest.approx(0.149, abs=5e-4)
    assert found["ratio"].median() == pytest.approx(1.48, abs=5e-3)
    assert (found["area"] - 1).abs().max() < 0.03  # no number stands for one who draws large
    assert load("lidc").sites[0].sizes() == {"train": 583, "val": 125, "test": 125}
