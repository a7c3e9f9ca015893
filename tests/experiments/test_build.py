"""A federation on a data set of one's own: what cannot train is refused, a finished run is had again."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini.data import Dataset, Site, Split, choose_sites
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.run import run
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.schedule import by_round, only
from fedlora_mini.federation.sharing import factors

TINY = {"size": 16, "rounds": 1, "steps": 1, "batch": 2, "threads": 1}


def hospital(label=1, channels=3, dtype=torch.float32, size=16, masks=torch.uint8, brightest=1.0, organ=1):
    y = torch.zeros(3, size, size, dtype=masks)
    y[:, 4:8, 4:8], y[:, 12, 12] = label, organ
    split = Split(brightest * torch.rand(3, channels, size, size, dtype=dtype), y)
    return Site(f"{label} {channels} {size} {dtype} {masks} {brightest} {organ}", split, split, split)


def own(site):
    return Dataset("hospital X", (hospital(), site), ("background", "organ"))


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"label": 7}, "labels are 0 to 1, numbers of `classes`, or 255 .*; got 7"),
        ({"label": -1, "masks": torch.int64}, "labels are 0 to 1, .*; got -1"),
        ({"masks": torch.float32}, "labels are whole numbers, such as torch.uint8, got torch.float32"),
        ({"channels": 1}, r"an image is \(3, 16, 16\) of torch.float32 in \[0, 1\], got \(1, 16, 16\)"),
        ({"dtype": torch.float64}, "an image is .*, got .* of torch.float64"),
        ({"size": 32}, r"an image is \(3, 16, 16\) .*, got \(3, 32, 32\)"),
        ({"brightest": 255.0}, r"an image is .* in \[0, 1\], got numbers from .* to 25"),
        ({"brightest": float("nan")}, r"an image is .* in \[0, 1\], got numbers from nan to nan"),
    ],
)
def test_data_that_no_network_can_train_on_are_refused(site, words):
    with pytest.raises(FedloraError, match=f"site '.*' of 'hospital X', train: {words}"):
        Federation.build(RunConfig(data="hospital X", **TINY), own(hospital(**site)))


@pytest.mark.parametrize(("label", "hint"), [(0, ""), (255, "; 255 says that nobody is judged")])
def test_a_site_that_could_not_be_scored_is_refused(label, hint):
    """Its mean Dice would be nan, and every mean with it; masks of 0 and 255 are a common way to get there."""
    with pytest.raises(FedloraError, match=f"test: no mask has any foreground, so there is no score{hint}$"):
        Federation.build(RunConfig(data="hospital X", **TINY), own(hospital(label=label, organ=0)))


def test_images_are_tensors():
    with pytest.raises(FedloraError, match=r"images are a torch.Tensor, got ndarray; see torch.from_numpy"):
        Split(torch.rand(2, 3, 16, 16).numpy(), torch.zeros(2, 16, 16))


def test_nobody_is_judged_on_ignored_labels():
    Federation.build(RunConfig(**TINY), own(hospital(label=255)))


def test_a_row_that_would_send_nothing_is_refused(monkeypatch):
    row = replace(METHODS["fedsa"], adapter="ia3", shared=factors("A", "B", head=False))
    monkeypatch.setitem(METHODS, "mine", row)
    with pytest.raises(FedloraError, match="no client would send a number; its factors: "):
        Federation.build(RunConfig(method="mine", **TINY), own(hospital(size=16, label=0)))


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"shared": factors("C", "B", head=True)}, "no factor 'C' in the encoder; its factors there: A, B"),
        ({"shared": factors("A", "C", head=True)}, "no factor 'C' in the decoder; its factors there: A, B"),
        ({"schedule": only("C")}, "no factor 'C' in the encoder"),
        ({"schedule": by_round("B", "C")}, "no factor 'C' in the encoder"),
    ],
)
def test_a_factor_that_no_layer_has_is_refused_before_anything_trains(monkeypatch, cells, words):
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["fedit"], **cells))
    with pytest.raises(FedloraError, match=words):
        Federation.build(RunConfig(method="mine", **TINY), own(hospital(label=0)))


@pytest.mark.parametrize(
    ("method", "steps", "moves"),
    [
        ("fedrep", {"steps": 1}, "decoder.*at least 2"),
        ("pfedlora", {"steps": 1}, "at least 2"),
        ("la_lora", {"passes": 0.5}, "A'.*takes 1 local step would never train it; at least 2"),
        ("rolora", {"steps": 1}, None),
        ("fedrep", {"steps": 2}, None),
    ],
)
def test_a_row_that_moves_something_late_needs_a_second_step(method, steps, moves):
    data, config = own(hospital(label=0)), RunConfig(method=method, **TINY | {"batch": 3} | steps)
    if moves is None:
        Federation.build(config, data)
    else:
        with pytest.raises(FedloraError, match=moves):
            Federation.build(config, data)


def test_a_filter_of_factors_is_refused_where_there_are_none():
    data = own(hospital(label=0))
    for name in ("low-pass", "permuted", "rescaled", "laplacian"):
        with pytest.raises(FedloraError, match=r"'FedAvg.*' trains no low-rank factor"):
            Federation.build(RunConfig(method="fedavg", change={"filter": name}, **TINY), data)
    Federation.build(RunConfig(method="fedavg", change={"filter": "doppler"}, **TINY), data)


def test_sites_that_are_called_by_numbers_are_chosen_by_name():
    sites = tuple(replace(hospital(label=0), name=str(k)) for k in (1, 2, 3))
    data = Dataset("numbers", sites, ("background", "organ"))
    assert [s.name for s in choose_sites(data, "3").sites] == ["3"]
    found = choose_sites(data, "2", "1")
    assert [s.name for s in found.sites] == ["2"] and [s.name for s in found.unseen] == ["1"]
    assert len(choose_sites(data, 2).sites) == 2
    words = Dataset("words", tuple(replace(s, name=f"site {s.name}") for s in sites), data.classes)
    assert [s.name for s in choose_sites(words, "2", "1").sites] == ["site 1", "site 2"]


def test_a_finished_run_on_own_data_asks_for_them(tmp_path, monkeypatch):
    data = own(hospital(label=0))
    monkeypatch.setattr("fedlora_mini.experiments.run.dataset_of", lambda config: data, raising=False)
    monkeypatch.setattr("fedlora_mini.experiments.federation.dataset_of", lambda config: data)
    run(RunConfig(data="hospital X", **TINY), tmp_path)
    monkeypatch.undo()
    with pytest.raises(FedloraError, match=r"unknown data set 'hospital X'.*Federation.finished\(folder, data="):
        Federation.finished(tmp_path)
    assert Federation.finished(tmp_path, data).server.round == 1
