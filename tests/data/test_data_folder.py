"""A reader's own data: every format, every problem as one line, no leakage between splits, quick the second time."""

import io
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from fedlora_mini.data import IGNORE, check, load
from fedlora_mini.data.fetch import home
from fedlora_mini.data.folder import group_of
from fedlora_mini.data.store import save_npz
from fedlora_mini.errors import FedloraError


def save(path: Path, array: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".npy"):
        np.save(path, array)
    elif ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    else:
        Image.fromarray(array).save(path, **options)


def grey(shape: tuple[int, ...] = (20, 20), dtype: type = np.uint8, top: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def disc(value: int = 1, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    y, x = np.indices(shape)
    return (((y - shape[0] // 2) ** 2 + (x - shape[1] // 2) ** 2 < 36) * value).astype(np.uint8)


def test_a_clean_folder_becomes_sites_with_70_15_15(hospitals: Path) -> None:
    report = check(hospitals)
    assert report.ok and list(report.sites) == ["east", "north", "south"]
    assert report.sites["north"] == {
        "images": 12,
        "slices": 12,
        "sizes": ["24x32"],
        "labels": [0, 255],
        "empty_share": 0.0,
    }
    data = load(hospitals, size=16)
    assert [s.name for s in data.sites] == ["east", "north", "south"] and data.classes == ("background", "foreground")
    assert data.sites[0].sizes() == {"train": 8, "val": 2, "test": 2}
    assert data.channels == 3 and data.spatial == (16, 16)
    assert data.sites[0].train.images.dtype == torch.float32 and data.sites[0].train.images.min() >= 0


def test_a_zip_of_it_loads_the_same_bytes(hospitals: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in hospitals.rglob("*.png"):
            archive.write(file, Path("deep/er") / file.relative_to(hospitals))
        archive.writestr("__MACOSX/deep/north/images/._x.png", b"")
        archive.writestr("deep/README.txt", b"hello")
    packed, plain = load(tmp_path / "all.zip"), load(hospitals)
    for a, b in zip(packed.sites, plain.sites, strict=True):
        assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.masks, b.test.masks)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (("a.png", grey()), ("a.png", disc(255))),
        (("a.jpg", grey((20, 20, 3))), ("a.png", disc(1))),
        (("a.jpeg", grey((20, 20, 3))), ("a.jpg", disc(255))),
        (("a.tif", grey(dtype=np.uint16, top=4000)), ("a.tif", disc(1))),
        (("a.npy", grey(dtype=np.float32, top=1000)), ("a.npy", disc(1).astype(bool))),
        (("a.npy", grey((20, 20, 3))), ("a.png", disc(255))),
        (("a.nii.gz", grey(dtype=np.int16, top=900)), ("a.nii.gz", disc(1))),
        (("a.TIFF", grey((20, 20, 4))), ("a.PNG", np.repeat(disc(255)[..., None], 3, 2))),
    ],
    ids=lambda pair: pair[0] + "x".join(map(str, pair[1].shape)),
)
def test_every_format_and_mixture_is_read(image: tuple, mask: tuple, tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "d/site/images" / image[0].replace("a.", f"a{i}."), image[1])
        save(tmp_path / "d/site/masks" / mask[0].replace("a.", f"a{i}."), mask[1])
    assert check(tmp_path / "d").problems == ()
    split = load(tmp_path / "d", size=20).sites[0].train
    assert torch.equal(split.masks[0], torch.from_numpy(disc(1)))
    assert split.images[0].max() > 0.9 and split.images[0].min() < 0.1


@pytest.mark.parametrize("extension", [".nii.gz", ".npy"])
def test_volumes_become_slices_and_stay_in_one_split(extension: str, tmp_path: Path) -> None:
    for i in range(6):
        volume, labels = np.full((20, 24, 7), 10.0 * i, np.float32), np.zeros((20, 24, 7), np.uint8)
        volume[0, 0, 0], labels[5:9, 5:9, 2:5] = 100.0, 2
        volume[..., 1:] += i
        save(tmp_path / f"d/site/images/v{i}{extension}", volume)
        save(tmp_path / f"d/site/masks/v{i}{extension}", labels)
    report = check(tmp_path / "d")
    assert report.ok and report.sites["site"]["slices"] == 42 and "(42 slices)" in str(report)
    with_organ, every = load(tmp_path / "d", size=20).sites[0], load(tmp_path / "d", size=20, slices="all").sites[0]
    assert sum(with_organ.sizes().values()) == 18 and sum(every.sizes().values()) == 42
    files = with_organ.record["files"]
    assert not set(files["train"]) & set(files["test"]) and len(with_organ.test) == 3 * len(files["test"])


def test_labels_are_numbered_by_value_and_one_can_be_ignored(tmp_path: Path) -> None:
    mask = disc(4)
    mask[:3], mask[-3:] = 9, 255
    for i in range(3):
        save(tmp_path / f"d/site/images/{i}.png", grey())
        save(tmp_path / f"d/site/masks/{i}.png", mask)
    data = load(tmp_path / "d", size=20)
    assert data.classes == ("background", "label 4", "label 9", "label 255")
    data = load(tmp_path / "d", size=20, ignore=255)
    assert data.classes == ("background", "label 4", "label 9")
    assert data.sites[0].train.masks.unique().tolist() == [0, 1, 2, IGNORE]


def test_sites_with_0_1_and_sites_with_0_255_agree(tmp_path: Path) -> None:
    for site, value in (("one", 1), ("two", 255)):
        for i in range(3):
            save(tmp_path / f"d/{site}/images/{i}.png", grey())
            save(tmp_path / f"d/{site}/masks/{i}.png", disc(value))
    data = load(tmp_path / "d", size=20)
    assert data.classes == ("background", "foreground")
    assert torch.equal(data.sites[0].train.masks, data.sites[1].train.masks)


def test_masks_are_resized_without_new_labels_and_images_by_area(tmp_path: Path) -> None:
    chess = (np.indices((40, 40)).sum(0) % 2 * 255).astype(np.uint8)
    for i in range(3):
        save(tmp_path / f"d/site/images/{i}.png", chess)
        save(
            tmp_path / f"d/site/masks/{i}.png", np.kron(np.array([[1, 7], [3, 0]]), np.ones((20, 20))).astype(np.uint8)
        )
    split = load(tmp_path / "d", size=20).sites[0].train
    assert torch.allclose(split.images, torch.tensor(0.5), atol=0.01)
    assert split.masks[0, 0, 0] == 1 and split.masks[0, 0, -1] == 3 and split.masks[0, -1, 0] == 2


def break_it(root: Path, problem: str) -> None:
    site = root / "north"
    if problem == "missing mask":
        (site / "masks/0_frame0.png").rename(site / "masks/0_frame0_mask.png")
    elif problem == "missing image":
        (site / "images/0_frame0.png").unlink()
    elif problem == "size":
        save(site / "masks/0_frame0.png", disc(255, (10, 10)))
    elif problem == "unreadable":
        (site / "images/0_frame0.png").write_bytes((site / "images/0_frame0.png").read_bytes()[:100])
    elif problem == "not a picture":
        (site / "masks/0_frame0.png").write_bytes(b"<html>")
    elif problem == "grey mask":
        save(site / "masks/0_frame0.png", grey((24, 32)))
    elif problem == "colour mask":
        save(site / "masks/0_frame0.png", grey((24, 32, 3)))
    elif problem == "unknown type":
        (site / "images/notes.docx").write_bytes(b"x")
    elif problem == "two of a name":
        save(site / "images/0_frame0.jpg", grey((24, 32)))
    elif problem == "nested":
        save(site / "images/more/x.png", grey((24, 32)))
    elif problem == "empty site":
        (root / "west/images").mkdir(parents=True)
    elif problem == "no foreground":
        for file in (site / "masks").iterdir():
            save(file, np.zeros((24, 32), np.uint8))
    elif problem == "pickled":
        (site / "images/0_frame0.png").unlink()
        np.save(site / "images/0_frame0.npy", np.array([{"a": 1}], dtype=object))
    elif problem == "not finite":
        (site / "images/0_frame0.png").unlink()
        np.save(site / "images/0_frame0.npy", np.full((24, 32), np.nan))
    elif problem == "flat layout":
        save(root / "images/x.png", grey())


PROBLEMS = {
    "missing mask": r"north/images/0_frame0.png: no mask of this name.*is it 0_frame0_mask\?",
    "missing image": "north/masks/0_frame0.png: no image of this name",
    "size": "image 24 x 32.*and mask 10 x 10.*differ in size",
    "unreadable": "north/images/0_frame0.png: cannot be read",
    "not a picture": "north/masks/0_frame0.png: cannot be read",
    "grey mask": "different values: a grey picture, not a label mask",
    "colour mask": "mask is in colour",
    "unknown type": r"notes.docx: type not known; readable are .nii.gz",
    "two of a name": "there is also 0_frame0.(png|jpg)",
    "nested": "lies in a folder inside 'images'",
    "empty site": "site 'west' is empty",
    "no foreground": "site 'north': no mask has any foreground",
    "pickled": "north/images/0_frame0.npy: cannot be read",
    "not finite": "NaN or infinite",
    "flat layout": "'images' lies directly in hospitals, without a folder for its site",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_is_a_line_an_error_and_can_be_left_out_loudly(problem: str, hospitals: Path) -> None:
    import re

    break_it(hospitals, problem)
    report = check(hospitals)
    lines = [line for line in report.problems if re.search(PROBLEMS[problem], line)]
    assert len(lines) == 1 and "\n" not in lines[0], report.problems
    assert lines[0] in str(report)
    with pytest.raises(FedloraError, match=r"problem\(s\)(.|\n)*fedlora data check"):
        load(hospitals, size=16)
    with pytest.warns(UserWarning, match="left out"):
        data = load(hospitals, size=16, skip_broken=True)
    assert len(data.sites) == (2 if problem == "no foreground" else 3)


def test_all_problems_are_listed_at_once(hospitals: Path) -> None:
    for problem in ("missing mask", "unknown type", "empty site", "nested"):
        break_it(hospitals, problem)
    report = check(hospitals)
    assert len(report.problems) == 5  # the renamed mask also lacks its image
    assert report.sites["north"]["images"] == 11 and "5 problems" in str(report)
    with pytest.raises(FedloraError, match="and 2 more"):
        load(hospitals)


def test_a_path_that_is_no_data_set_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../x/images/a.png", b"")
    expected = {"empty": "no <site>/images folder", "text.zip": "neither a folder nor a zip", "evil.zip": "unsafe name"}
    for name, words in {**expected, "nowhere": "no folder or zip"}.items():
        assert len(check(tmp_path / name).problems) == 1 and words in check(tmp_path / name).problems[0]
        with pytest.raises(FedloraError, match=words):
            load(tmp_path / name)


def test_a_damaged_member_of_a_zip_is_one_line(hospitals: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(hospitals.rglob("*.png")):
            archive.write(file, file.relative_to(hospitals))
        offset = archive.getinfo("north/images/0_frame0.png").header_offset
    data = bytearray(buffer.getvalue())
    data[offset + 200] ^= 0xFF
    (tmp_path / "bad.zip").write_bytes(data)
    problems = check(tmp_path / "bad.zip").problems
    assert len(problems) == 1 and problems[0].startswith("north/images/0_frame0.png")


def test_contiguous_splits_are_blocks_of_natural_order(hospitals: Path) -> None:
    files = load(hospitals, size=16).sites[0].record["files"]
    number = {part: sorted(int(name.split("frame")[1]) for name in names) for part, names in files.items()}
    for part in number.values():
        assert part == list(range(part[0], part[0] + len(part)))
    assert sorted(i for part in number.values() for i in part) == list(range(12))


def test_groups_stay_together(hospitals: Path) -> None:
    for seed in range(5):
        for site in load(hospitals, size=16, seed=seed, group=r"^(\d+)_").sites:
            groups = [{name.split("_")[0] for name in part} for part in site.record["files"].values()]
            assert all(groups) and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    data = load(hospitals, size=16, group={"north": r"^\d"})
    assert [s.record["split"] for s in data.sites] == ["contiguous", r"group ^\d", "contiguous"]


def test_grouping_mistakes_are_named(hospitals: Path) -> None:
    assert group_of("12_frame3", r"^(\d+)_") == "12"
    with pytest.raises(FedloraError, match="does not match the name '0_frame0'"):
        load(hospitals, group=r"^patient(\d+)")
    with pytest.raises(FedloraError, match="not a regular expression"):
        load(hospitals, group="(")
    with pytest.raises(FedloraError, match="at least 3 groups, got 1"):
        load(hospitals, group="frame")
    with pytest.raises(FedloraError, match="Did you mean 'north'"):
        load(hospitals, group={"nort": r"\d"})
    with pytest.raises(FedloraError, match="accepted: contiguous, random"):
        load(hospitals, grouping="patient")


def test_random_grouping_depends_on_the_seed_alone(hospitals: Path) -> None:
    one, same, other = (load(hospitals, size=16, seed=s, grouping="random").sites[0].record["files"] for s in (1, 1, 2))
    assert one == same != other


def test_the_cache_is_used_until_a_file_changes(
    hospitals: Path, own_home: Path, pair_writer: Callable[..., None]
) -> None:
    first = load(hospitals, size=16)
    cached = list((own_home / "folder").glob("*.npz"))
    assert len(cached) == 1
    stamp = cached[0].stat().st_mtime_ns
    again = load(hospitals, size=16)
    assert cached[0].stat().st_mtime_ns == stamp and torch.equal(
        first.sites[0].train.images, again.sites[0].train.images
    )
    pair_writer(hospitals / "north", "9_frame99", np.random.default_rng(1))
    os.utime(hospitals / "north/images/9_frame99.png", (time.time(), time.time()))
    assert sum(load(hospitals, size=16).sites[1].sizes().values()) == 13


def test_too_few_images_for_three_splits_name_the_site(hospitals: Path) -> None:
    for file in sorted((hospitals / "north").rglob("*.png")):
        if file.stem not in ("0_frame0", "0_frame1"):
            file.unlink()
    with pytest.raises(FedloraError, match=r"site 'north'.*at least 3"):
        load(hospitals)


@pytest.mark.slow
def test_the_six_hospitals_load_in_seconds_and_one_is_held_out(real_data: Path) -> None:
    path = real_data / "polypgen/polypgen256.zip"
    start = time.process_time()
    data = load(path, unseen="C6", group={"C1": r"^(\d+)", "C4": r"^(\d+)"})
    assert time.process_time() - start < 30  # about 2 s
    totals = {s.name: sum(s.sizes().values()) for s in (*data.sites, *data.unseen)}
    assert totals == {"C1": 256, "C2": 301, "C3": 457, "C4": 227, "C5": 208, "C6": 88}
    assert [s.name for s in data.unseen] == ["C6"] and len(data.sites) == 5
    for site in data.sites:
        parts = [set(v) for v in site.record["files"].values()]
        if site.name in ("C1", "C4"):
            parts = [{group_of(name, r"^(\d+)") for name in part} for part in parts]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.mark.slow
def test_the_six_hospitals_have_no_problem_and_the_known_empty_masks(real_data: Path) -> None:
    report = check(real_data / "polypgen/polypgen256.zip")
    assert report.ok
    empty = {name: round(s["empty_share"] * s["images"]) for name, s in report.sites.items()}
    assert empty == {"C1": 5, "C2": 32, "C3": 1, "C4": 81, "C5": 2, "C6": 5}


def test_a_cache_that_cannot_be_written_is_done_without(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(hospitals / "north/images/0_frame0.png"))  # a file, where a folder is wanted
    with pytest.warns(UserWarning, match="not kept for the next time: cannot write .*FEDLORA_HOME names the folder"):
        assert len(load(hospitals, size=16).sites) == 3
    with pytest.raises(FedloraError, match=r"cannot write .*FEDLORA_HOME names the folder"):
        save_npz(home() / "nuclei/tiles64.npz", x=np.zeros(1))


def test_check_finds_a_site_that_is_too_small_to_split(hospitals: Path) -> None:
    for file in hospitals.glob("south/*/*.png"):
        if not file.name.startswith(("0_frame0", "0_frame1")):
            file.unlink()
    assert check(hospitals).problems == ("site 'south' has 2 images: three splits need at least 3",)
    with pytest.raises(FedloraError, match="site 'south' has 2 images"):
        load(hospitals, size=16)
    with pytest.warns(UserWarning, match="left out: site 'south' has 2 images"):
        assert [site.name for site in load(hospitals, size=16, skip_broken=True).sites] == ["east", "north"]


@pytest.mark.parametrize(
    ("values", "warned"), [((1, 2), True), ((1, 255), False), ((255, 255), False), ((2, 2), False), ((2, 255), True)]
)
def test_check_warns_where_sites_hold_other_labels(values: tuple[int, int], warned: bool, tmp_path: Path) -> None:
    for site, value in zip("ab", values, strict=True):
        for i in range(3):
            save(tmp_path / site / "images" / f"{i}.png", grey())
            save(tmp_path / site / "masks" / f"{i}.png", disc(value))
    report = check(tmp_path)
    told = f"warning: sites differ in their labels, .*: a {values[0]}; b {values[1]}"
    assert report.ok and bool(re.search(told, str(report))) == bool(report.warnings) == warned
