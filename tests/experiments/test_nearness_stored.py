"""The phantom's cells as controls, and the stored records: complete, readable, and the same when made again."""

import json
import math
from pathlib import Path

import pytest
import torch

from fedlora_mini.adapters import freeze
from fedlora_mini.data import load
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import nearness as near
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import dataset_of
from fedlora_mini.models import load_base

STORED = Path(__file__).parents[2] / "results/nearness.jsonl"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stored():
    return near.read(STORED)


@pytest.mark.slow
def test_supervision_leaves_the_features_and_appearance_moves_them_far_beyond_chance():
    """The controls: without a shift, or under supervision alone, two sites are like two halves of one."""
    found = {}
    model = freeze(load_base("minisam", 6, (64, 64)))
    for name, (a, s) in {"none": (0, 0), "appearance": (1, 0), "supervision": (0, 1)}.items():
        data = load("phantom", sites=3, unseen=0, per_site=24, val=1, test=1, appearance=a, supervision=s)
        own = [near.inputs(model, site.train) for site in data.sites]
        found[name] = {path: near.between([each[path] for each in own], 4) for path in own[0]}
    for path, none in found["none"].items():
        assert none["monge"] == found["supervision"][path]["monge"], "the same images"
        assert none["monge"]["strength"] < 2 * none["monge null"]["strength"], path
    ratio = [own["monge"]["strength"] / own["monge null"]["strength"] for own in found["appearance"].values()]
    assert min(ratio) > 3 and math.prod(ratio) ** (1 / len(ratio)) > 10


def test_every_data_set_is_stored_with_its_provenance_and_three_splits(stored):
    for case in near.CASES:
        own = near.of(stored, case, "minisam")
        assert len(own) >= 3 and len({r["config"]["seed"] for r in own}) == len(own)
        for r in own:
            assert {"versions", "machine", "sites", "losses", "layers", "seconds"} <= r.keys()
            wanted = near.config_of(case, "minisam", r["config"]["seed"]).asdict()
            assert {**RunConfig().asdict(), **r["config"]}.items() >= wanted.items()  # later settings are at rest
            assert r["losses"].keys() == set(near.starts_of(case, "minisam", r["config"]["seed"]))
    with pytest.raises(FedloraError, match="no record of phantom, both / unet"):
        near.of(stored, "phantom, both", "unet")


def test_a_study_makes_only_what_its_file_lacks(stored, tmp_path, monkeypatch):
    path, made = tmp_path / "nearness.jsonl", []
    kept = near.of(stored, "phantom, none", "minisam")
    path.write_text("".join(json.dumps(r) + "\n" for r in kept[1:]), encoding="utf-8")
    monkeypatch.setattr(near.records, "measure", lambda model, data, config, *how: {"config": config.asdict()})
    near.study(path, ["phantom, none"], ["minisam"], progress=lambda record: made.append(record["config"]["seed"]))
    assert made == [0] and len(near.read(path)) == 3


@pytest.mark.slow
def test_the_stored_records_make_a_table_and_a_picture(stored):
    table = near.table(stored)
    assert set(table["data"]) == set(near.CASES) and set(table["share"]) <= {"A", "B", "either"}
    drawing = near.figure(stored, ["phantom, appearance", "lgg"])
    assert len(drawing.axes) == 6 and drawing._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stored_record_made_again_gives_the_same_numbers(stored):
    old = next(r for r in near.of(stored, "phantom, supervision", "minisam") if r["config"]["seed"] == 1)
    config = near.config_of("phantom, supervision", "minisam", 1)
    data = dataset_of(config)
    new = near.measure(load_base("minisam", len(data.classes), data.spatial, config.base, 1), data, config, ["dense"])
    for path, layer in old["layers"].items():
        mine = new["layers"][path]
        assert mine["features"]["monge"]["strength"] == pytest.approx(layer["features"]["monge"]["strength"], rel=0.01)
        assert mine["dense"] == pytest.approx(layer["dense"], abs=0.02), path


def test_a_file_that_was_cut_off_in_its_last_line_has_the_others(tmp_path):
    whole = STORED.read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    (tmp_path / "cut.jsonl").write_text("".join(whole[:2]) + whole[2][:100], encoding="utf-8")
    assert near.read(tmp_path / "cut.jsonl") == near.read(STORED)[:2]
