"""Hippocampus: either packing of the same volumes, nothing lost in the box, both volumes of a person in one split."""

import gzip
import hashlib
import io
import runpy
import sys
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_cdt

from fedlora_mini.data import fetch, gallery, hippocampus, load, options, prepare, shift_table
from fedlora_mini.data.fetch import tar_files
from fedlora_mini.data.registry import available
from fedlora_mini.errors import FedloraError
from fedlora_mini.models.zoo import build, check_size

pytestmark = pytest.mark.filterwarnings("ignore:left out")  # said aloud by design, and asserted below

CASES = ("001", "002", "003", "004", "007", "008", "011", "015", "016", "020")  # seven people, three with both sides
LAYOUTS = (("TrainingSet/images", "TrainingSet/labels"), ("Task04_Hippocampus/imagesTr", "Task04_Hippocampus/labelsTr"))


def volumes(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy block (X, Y, Z) with two boxes of labels, of a size and scale of its own."""
    rng = np.random.default_rng(number)
    shape = (31 + number % 13, 40 + number % 20, 24 + number % 24)
    image = rng.integers(0, 200, shape).astype(np.float32) * 10 ** (number % 3)
    label = np.zeros(shape, np.uint8)
    label[8:20, 20:33, 6:15], label[10:19, 5:20, 9:18] = 1, 2
    return image, label


def nifti(values: np.ndarray, axes: str = "RAS") -> bytes:
    """The volume stored along other axes, e.g. "LPS": the affine says so, the anatomy stays."""
    ras = nibabel.Nifti1Image(values, np.eye(4))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(np.eye(4)), nibabel.orientations.axcodes2ornt(axes)
    )
    return gzip.compress(ras.as_reoriented(turn).to_bytes(), compresslevel=1, mtime=0)


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


@cache
def packing(layout: tuple[str, str], axes: str = "RAS", kind: str = "f4") -> dict[str, bytes]:
    files = {}
    for case in CASES:
        for folder, values in zip(layout, volumes(int(case)), strict=True):
            files[f"{folder}/hippocampus_{case}.nii.gz"] = nifti(values.astype(kind), axes)
    return files


def refused(path: Path, words: str) -> None:
    with pytest.raises(FedloraError, match=words):
        prepare("hippocampus", path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first packing, with an image that has no label and a label that has no image."""
    images, labels = LAYOUTS[0]
    files = dict(packing(LAYOUTS[0]))
    files[f"{images}/hippocampus_030.nii.gz"] = nifti(volumes(30)[0])
    files[f"{labels}/hippocampus_032.nii.gz"] = nifti(volumes(32)[1])
    files[f"{images}/.DS_Store"] = b"not a volume"
    return write_tar(tmp_path_factory.mktemp("archive") / "download.tar", files)


@pytest.fixture
def small(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hippocampus, "CONTENT_SHA256", hippocampus.voxel_digest(archive))
    return archive


def test_both_layouts_of_the_same_volumes_have_one_digest(archive: Path, tmp_path: Path) -> None:
    public = dict(packing(LAYOUTS[1], axes="LPS", kind="i4"))
    public["Task04_Hippocampus/imagesTs/hippocampus_099.nii.gz"] = nifti(volumes(99)[0])
    public["Task04_Hippocampus/imagesTr/._hippocampus_001.nii.gz"] = b"resource fork"
    public["Task04_Hippocampus/dataset.json"] = b"{}"
    other = write_tar(tmp_path / "public.tar", public)
    assert hippocampus.voxel_digest(other) == hippocampus.voxel_digest(archive)
    assert hippocampus.read_cases(other)[1] == []
    for folder, place in zip(LAYOUTS[1], (0, 1), strict=True):
        changed = volumes(1)
        changed[place][9, 9, 9] += 1
        name = f"{folder}/hippocampus_001.nii.gz"
        one = write_tar(tmp_path / "one.tar", public | {name: nifti(changed[place])})
        assert hippocampus.voxel_digest(one) != hippocampus.voxel_digest(archive)


def test_a_case_without_its_twin_is_left_out_by_name(small: Path) -> None:
    with pytest.warns(UserWarning) as said:
        prepare("hippocampus", small)
    lines = ["case 030: its label is missing", "case 032: its image is missing"]
    assert [str(w.message) for w in said] == [f"left out: {line}" for line in lines]
    data = load("hippocampus")
    assert data.sites[0].record["skipped"] == lines and all(line in data.note for line in lines)
    assert "2 incomplete cases" in data.note and "CC BY-SA 4.0" in data.licence
    used = [case for part in data.sites[0].record["cases"].values() for case in part]
    assert sorted(used) == list(CASES)


def test_the_volumes_come_out_as_they_were_centred_in_the_box(small: Path) -> None:
    prepare("hippocampus", small)
    data = load("hippocampus")
    assert (
        data.spatial == (48, 64, 48) and data.channels == 3 and data.classes == ("background", "anterior", "posterior")
    )
    site = data.sites[0]
    assert site.record["label_voxels_lost"] == 0 and site.record["voxel_mm"] == 1.0
    for part in ("train", "val", "test"):
        split = getattr(site, part)
        for row, case in enumerate(site.record["cases"][part]):
            image, label = volumes(int(case))
            low, high = np.percentile(image, 0.5), np.percentile(image, 99.5)
            corner = [(side - have) // 2 for side, have in zip((48, 64, 48), image.shape, strict=True)]
            inside = tuple(slice(at, at + have) for at, have in zip(corner, image.shape, strict=True))
            wanted = np.clip((image - low) / (high - low), 0, 1)
            assert np.array_equal(split.masks[row][inside].numpy(), label)
            assert int((split.masks[row] > 0).sum()) == int((label > 0).sum())
            assert np.abs(split.images[row][:, *inside].numpy() - wanted).max() <= 0.5 / 255 + 1e-6
            assert (split.images[row] > 0).sum() == (split.images[row][:, *inside] > 0).sum()


def test_half_the_size_keeps_the_proportions_and_the_majority_of_every_block(small: Path) -> None:
    for size in (64, 32):
        prepare("hippocampus", small, size)
    full, half = (load("hippocampus", size=size).sites[0].train for size in (64, 32))
    assert half.masks.shape[1:] == (24, 32, 24)
    blocks = full.images[:, 0].reshape(-1, 24, 2, 32, 2, 24, 2).mean((2, 4, 6))
    assert torch.allclose(half.images[:, 0], blocks, atol=1.5 / 255)  # both were rounded to bytes
    mask = full.masks[0].numpy()
    for x, y, z in np.ndindex(24, 32, 24):
        votes = np.bincount(mask[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].ravel(), minlength=3)
        assert half.masks[0, x, y, z] == votes.argmax()


def test_twice_the_size_is_every_voxel_eightfold_but_for_the_edges(tmp_path: Path) -> None:
    files = {name: data for name, data in packing(LAYOUTS[0]).items() if "_001" in name}
    path = write_tar(tmp_path / "a.tar", files)
    coarse, fine = (hippocampus.prepare_volumes(path, size)["masks"][0] for size in (64, 128))
    blown = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert fine.shape == (96, 128, 96)
    away = distance_transform_cdt(np.pad(blown, 1, mode="edge") == 0)[1:-1, 1:-1, 1:-1]  # from the structures
    for label in (1, 2):
        inner = binary_erosion(blown == label, iterations=2)
        assert (fine[inner] == label).all() and inner.sum() > 1000
    assert (fine[away > 2] == 0).all()


def test_what_a_box_cuts_off_is_counted(tmp_path: Path) -> None:
    image, label = np.random.default_rng(0).random((60, 64, 30), np.float32), np.zeros((60, 64, 30), np.uint8)
    label[:8, 0, 0], label[30, 30, 10:15] = 1, 2  # the box keeps rows 6 to 53 of the first axis
    folder, other = LAYOUTS[0]
    name = "hippocampus_001.nii.gz"
    path = write_tar(tmp_path / "a.tar", {f"{folder}/{name}": nifti(image), f"{other}/{name}": nifti(label)})
    out = hippocampus.prepare_volumes(path, 64)
    assert out["lost"].tolist() == [6] and np.bincount(out["masks"].ravel()).tolist()[1:] == [2, 5]


def test_the_scale_of_a_volume_does_not_matter_and_outliers_do_not_dim_it() -> None:
    image = np.random.default_rng(0).random((30, 40, 30)).astype(np.float32)
    bright = image * 5000 + 40
    bright[3, 3, 3] = 1e6
    gap = np.abs(hippocampus.scale(bright) - hippocampus.scale(image))
    gap[3, 3, 3] = 0
    assert gap.max() < 1e-2
    assert hippocampus.scale(image).min() == 0 and hippocampus.scale(image).max() == 1
    assert np.isfinite(hippocampus.scale(np.zeros((4, 4, 4), np.float32))).all()


def test_splits_are_disjoint_by_person_and_follow_the_seed(small: Path) -> None:
    prepare("hippocampus", small, 16)
    seen = set()
    for seed in range(6):
        site, again = (load("hippocampus", size=16, seed=seed).sites[0] for _ in range(2))
        assert site.record == again.record and torch.equal(site.train.images, again.train.images)
        people = [{(int(case) + 1) // 2 for case in part} for part in site.record["cases"].values()]
        assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
        assert sum(site.sizes().values()) == len(CASES) and all(site.sizes().values())
        seen.add(str(site.record["cases"]))
    assert len(seen) > 1


def test_preparing_twice_gives_the_same_arrays_without_pickle(small: Path) -> None:
    first, again = (hippocampus.prepare_volumes(small, 32) for _ in range(2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    with np.load(prepare("hippocampus", small, 32), allow_pickle=False) as stored:
        assert all(np.array_equal(first[key], stored[key]) for key in stored.files)


def test_a_cube_fits_the_networks_that_want_one(small: Path) -> None:
    assert options("hippocampus") == {"cube": False, "test_seed": None}
    prepare("hippocampus", small, 32)
    plain, cube = (load("hippocampus", size=32, cube=value) for value in (False, True))
    assert cube.spatial == (32, 32, 32)
    assert torch.equal(cube.sites[0].train.masks[:, 4:28, :, 4:28], plain.sites[0].train.masks)
    assert cube.sites[0].train.masks.sum() == plain.sites[0].train.masks.sum()
    with pytest.raises(FedloraError, match="unetr3d"):
        check_size("unetr3d", plain.spatial)
    check_size("unetr3d", cube.spatial)
    for name, data in (("unetr3d", cube), ("unet3d", plain)):
        logits = build(name, len(data.classes))(data.sites[0].test.images[:1])
        assert logits.shape == (1, 3, *data.spatial)


def test_the_overview_of_volumes_works(small: Path) -> None:
    prepare("hippocampus", small, 32)
    data = load("hippocampus", size=32)
    stats = shift_table(data).loc["hippocampus"]
    full = data.sites[0].train.masks > 0
    assert stats["foreground_share"] == pytest.approx(full.float().mean().item(), rel=1e-4)
    assert stats["objects_per_image"] == pytest.approx(2.0)
    assert len(gallery(data, per_site=2).axes) == 2


@pytest.mark.parametrize("size", [30, 4, 0])
def test_a_size_that_breaks_the_proportions_is_refused(size: int, small: Path) -> None:
    with pytest.raises(FedloraError, match=f"no size {size}; accepted: multiples of 4"):
        prepare("hippocampus", small, size)


def test_a_wrong_archive_is_refused(archive: Path, tmp_path: Path, own_home: Path) -> None:
    refused(archive, "corrupt or another version")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:100_000])
    refused(cut, "not a readable tar")
    cut.write_bytes(b"no archive")
    refused(cut, "not a readable tar")
    refused(write_tar(tmp_path / "empty.tar", {"README": b"r"}), "holds no hippocampus")
    assert not list(own_home.rglob("*.npz"))


def test_the_known_archives_are_accepted_by_their_own_digest(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = archive.read_bytes()
    for name, value in (("FILE_SHA256", hashlib.sha256(body)), ("PUBLIC_MD5", hashlib.md5(body))):
        with monkeypatch.context() as patch:
            patch.setattr(hippocampus, name, value.hexdigest())
            hippocampus.verify(archive)
    with pytest.raises(FedloraError, match="another version"):
        hippocampus.verify(archive)


def test_the_public_digest_is_the_one_that_monai_checks() -> None:
    from monai.apps.datasets import DecathlonDataset

    assert DecathlonDataset.md5["Task04_Hippocampus"] == hippocampus.PUBLIC_MD5
    assert DecathlonDataset.resource["Task04_Hippocampus"] == hippocampus.URL


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"rubbish", r"imagesTr/hippocampus_001.nii.gz cannot be read"),
        (gzip.compress(b"not a volume" * 100, mtime=0), r"hippocampus_001.nii.gz cannot be read"),
        (nifti(volumes(1)[0])[:5000], r"hippocampus_001.nii.gz cannot be read"),
        (nifti(volumes(2)[0]), "differ in size"),
        (nifti(volumes(1)[0] * np.float32("nan")), "expected a finite volume"),
    ],
    ids=["rubbish", "no volume", "cut off", "other size", "not finite"],
)
def test_a_damaged_volume_is_named(file: bytes, words: str, tmp_path: Path) -> None:
    name = f"{LAYOUTS[1][0]}/hippocampus_001.nii.gz"
    refused(write_tar(tmp_path / "a.tar", packing(LAYOUTS[1]) | {name: file}), words)


def test_labels_and_voxels_of_another_kind_are_named(tmp_path: Path) -> None:
    name = "hippocampus_001.nii.gz"
    image, label = volumes(1)
    thick = nibabel.Nifti1Image(image, np.diag([1, 1, 2, 1]))
    files = dict(packing(LAYOUTS[1]))
    for folder, data, words in (
        (LAYOUTS[1][1], nifti(label * 3), r"holds the labels \[0, 3, 6\]"),
        (LAYOUTS[1][0], gzip.compress(thick.to_bytes(), mtime=0), "1 mm voxels"),
    ):
        refused(write_tar(tmp_path / "a.tar", files | {f"{folder}/{name}": data}), words)
    files[f"{LAYOUTS[0][0]}/{name}"] = nifti(image)
    refused(write_tar(tmp_path / "a.tar", files), "two files for the image of case 001")


@pytest.mark.parametrize("name", ["../images/hippocampus_001.nii.gz", "/images/a.nii.gz", "a/../../b.nii.gz"])
def test_an_archive_that_climbs_out_is_refused(name: str, tmp_path: Path) -> None:
    refused(write_tar(tmp_path / "a.tar", packing(LAYOUTS[0]) | {name: b"x"}), "unsafe")


def test_a_tar_is_read_in_place_and_its_links_are_not_followed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", {"set/b.txt": b"B", "set/a.txt": b"A", "set/c.png": b"C"}, "w:gz")
    assert dict(tar_files(path, ".txt")) == {"set/b.txt": b"B", "set/a.txt": b"A"}
    with tarfile.open(tmp_path / "links.tar", "w") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("set/link.txt")
            info.type, info.linkname = kind, "../../../etc/passwd"
            out.addfile(info)
    assert list(tar_files(tmp_path / "links.tar")) == []
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["a.tar.gz", "links.tar"]


def test_without_the_data_the_error_says_what_to_run() -> None:
    row = next(r for r in available() if r["name"] == "hippocampus")
    assert row["ready"] == "run `fedlora data fetch hippocampus`" and row["licence"] == "CC BY-SA 4.0"
    with pytest.raises(FedloraError, match="fedlora data fetch hippocampus"):
        load("hippocampus")


def test_the_script_downloads_through_an_interruption(
    small: Path,
    server,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.body, server.drop_after = small.read_bytes(), [200_000]
    monkeypatch.setattr("time.sleep", lambda _: None)
    script = Path(__file__).parents[2] / "data_scripts" / "hippocampus.py"
    monkeypatch.setattr(sys, "argv", ["hippocampus.py", "--from", server.url])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "cases: 10\n" in printed and "case 030: its label is missing" in printed and "CC BY-SA 4.0" in printed
    assert "native shapes: 32 x 40 x 25 to 42 x 56 x 44 voxels of 1 mm; label voxels lost: 0" in printed
    assert (own_home / hippocampus.ARCHIVE).read_bytes() == server.body
    assert server.ranges == [None, "bytes=200000-"]
    assert fetch("hippocampus") == hippocampus.prepared(64)
    monkeypatch.setattr(sys, "argv", ["hippocampus.py", "--from", str(own_home / "nothing")])
    with pytest.raises(SystemExit, match="no file"):
        runpy.run_path(str(script), run_name="__main__")


def test_a_corrupt_download_is_refused_and_never_left(small: Path, server, own_home: Path) -> None:
    server.body = small.read_bytes().replace(b"hippocampus_001", b"hippocampus_005")
    with pytest.raises(FedloraError, match="refused and deleted"):
        prepare("hippocampus", server.url)
    assert not [p for p in own_home.rglob("*") if p.is_file()]


@pytest.mark.slow
def test_the_real_volumes_are_whole_and_say_what_the_note_says(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = real_data / hippocampus.ARCHIVE
    hippocampus.verify(path)
    monkeypatch.setattr(hippocampus, "FILE_SHA256", "so that the voxels are checked")
    with pytest.warns(UserWarning, match="left out"):
        data = load("hippocampus")
    site = data.sites[0]
    assert [line[:8] for line in site.record["skipped"]] == ["case 010", "case 118", "case 281"]
    assert site.sizes() == {"train": 182, "val": 39, "test": 39} and data.spatial == (48, 64, 48)
    assert site.record["native_shapes"] == {"least": [31, 40, 24], "most": [43, 59, 47]}
    assert site.record["label_voxels_lost"] == 0
    masks = torch.cat([split.masks for split in (site.train, site.val, site.test)])
    assert len(masks) == 260 and all(mask.unique().tolist() == [0, 1, 2] for mask in masks)
    images = torch.cat([split.images[:, 0] for split in (site.train, site.val, site.test)])
    images = images - images.mean((1, 2, 3), keepdim=True)
    template = images.mean(0)  # every volume is more like it than its mirror image is: one handedness
    assert ((images * template).sum((1, 2, 3)) > (images.flip(1) * template).sum((1, 2, 3))).all()

    medians = {int(case): np.log(np.median(image)) for case, (image, _) in hippocampus.read_cases(path)[0].items()}
    gaps = {k: abs(medians[k] - medians[k + 1]) for k in medians if k + 1 in medians}
    assert max(gap for k, gap in gaps.items() if k % 2) < 0.1 < np.median([g for k, g in gaps.items() if k % 2 == 0])
