"""The brain: real anatomy whose sites are called simulated, with gaps between the splits."""

import sys

import pytest
import torch

from fedlora_mini.data import load
from fedlora_mini.data.brain import GAP, PATTERN, bands
from fedlora_mini.errors import FedloraError


def test_bands_of_different_splits_are_apart() -> None:
    chosen = bands(20, 150)
    owner = {z: part for part, slices in chosen.items() for z in slices}
    for z, part in owner.items():
        for step in range(1, GAP + 1):
            assert owner.get(z + step, part) == part
    assert set(chosen) == set(PATTERN) and len(chosen["train"]) > 3 * len(chosen["test"]) > 0


def test_without_nilearn_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(FedloraError, match="pip install nilearn"):
        load("brain")


@pytest.mark.slow
def test_sites_are_called_simulated_and_share_no_slice() -> None:
    pytest.importorskip("nilearn")
    plain, look, rule = (load("brain", size=32, appearance=a, supervision=s) for a, s in ((0, 0), (1, 0), (0, 1)))
    assert "simulated" in plain.name and "SIMULATED" in plain.note
    assert plain.classes == ("background", "grey matter", "white matter")
    used = [z for s in (*plain.sites, *plain.unseen) for part in s.record["slices"].values() for z in part]
    assert len(used) == len(set(used)) > 80
    for k, site in enumerate(plain.sites):
        assert site.name.startswith("simulated") and site.train.masks.unique().tolist() == [0, 1, 2]
        assert torch.equal(site.train.masks, look.sites[k].train.masks)
        assert torch.equal(site.train.images, rule.sites[k].train.images)
        assert not torch.equal(site.train.images, look.sites[k].train.images)
        assert not torch.equal(site.train.masks, rule.sites[k].train.masks)
    bright = plain.sites[0].train
    grey, white = (bright.images[:, 0][bright.masks == label].mean() for label in (1, 2))
    assert white > grey  # T1: white matter is the brighter


def test_too_many_sites_for_one_volume_are_refused() -> None:
    with pytest.raises(FedloraError, match="1 to 8 simulated sites"):
        load("brain", sites=9)
