"""A federation on a data set of one's own: what cannot train is refused, a finished run is had again."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini.data import Dataset, Site, Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.run import run
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.sharing import factors

TINY = {"size": 16, "rounds": 1, "steps": 1, "batch": 2, "threads": 1}


def hospital(label=1, channels=3, dtype=torch.float32, size=16, masks=torch.uint8):
    y = torch.zeros(3, size, size, dtype=masks)
    y[:, 4:8, 4:8] = label
    split = Split(torch.rand(3, channels, size, size, dtype=dtype), y)
    return Site(f"{label} {channels} {size} {dtype} {masks}", split, split, split)


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
    ],
)
def test_data_that_no_network_can_train_on_are_refused(site, words):
    with pytest.raises(FedloraError, match=f"site '.*' of 'hospital X', train: {words}"):
        Federation.build(RunConfig(data="hospital X", **TINY), own(hospital(**site)))


def test_nobody_is_judged_on_ignored_labels():
    Federation.build(RunConfig(**TINY), own(hospital(label=255)))


def test_a_row_that_would_send_nothing_is_refused(monkeypatch):
    row = replace(METHODS["fedsa"], adapter="ia3", shared=factors("A", "B", head=False))
    monkeypatch.setitem(METHODS, "mine", row)
    with pytest.raises(FedloraError, match="no client would send a number; its factors: "):
        Federation.build(RunConfig(method="mine", **TINY), own(hospital(size=16, label=0)))


def test_a_finished_run_on_own_data_asks_for_them(tmp_path, monkeypatch):
    data = own(hospital(label=0))
    monkeypatch.setattr("fedlora_mini.experiments.run.dataset_of", lambda config: data, raising=False)
    monkeypatch.setattr("fedlora_mini.experiments.federation.dataset_of", lambda config: data)
    run(RunConfig(data="hospital X", **TINY), tmp_path)
    monkeypatch.undo()
    with pytest.raises(FedloraError, match=r"unknown data set 'hospital X'.*Federation.finished\(folder, data="):
        Federation.finished(tmp_path)
    assert Federation.finished(tmp_path, data).server.round == 1
