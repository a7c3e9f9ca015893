"""The phantom: the 2x2 is a config, the cells are paired, and the same seed gives the same bytes."""

import json

import pytest
import torch

from fedlora_mini.data import Appearance, Split, Supervision, load
from fedlora_mini.data.phantom import CLASSES, sample
from fedlora_mini.data.seeds import generator
from fedlora_mini.errors import FedloraError

SMALL = {"size": 32, "sites": 3, "unseen": 1, "per_site": 5, "val": 2, "test": 4}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    first, again, other = (load("phantom", seed=s, supervision=1.0, **SMALL) for s in (3, 3, 4))
    for a, b, c in zip(first.sites, again.sites, other.sites, strict=True):
        assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.masks, b.test.masks)
        assert a.record == b.record != c.record
        assert not torch.equal(a.train.images, c.train.images)


def test_the_four_cells_are_paired() -> None:
    none, look, rule, both = (
        load("phantom", appearance=a, supervision=s, **SMALL) for a, s in ((0, 0), (1, 0), (0, 1), (1, 1))
    )
    for k in range(3):
        assert torch.equal(none.sites[k].train.masks, look.sites[k].train.masks)
        assert torch.equal(none.sites[k].train.images, rule.sites[k].train.images)
        assert torch.equal(both.sites[k].train.images, look.sites[k].train.images)
        assert torch.equal(both.sites[k].train.masks, rule.sites[k].train.masks)
        assert not torch.equal(none.sites[k].train.images, look.sites[k].train.images)
    still = none.sites[0].record["appearance"]
    assert still == Appearance(bias_angle=still["bias_angle"], style=still["style"]).record()
    assert none.sites[0].record["supervision"] == Supervision().record()


def test_every_site_has_its_own_written_shift_and_the_unseen_site_too() -> None:
    data = load("phantom", supervision=1.0, **SMALL)
    records = [s.record for s in (*data.sites, *data.unseen)]
    assert json.loads(json.dumps(records)) == records
    assert len({json.dumps(r["appearance"]) for r in records}) == 4
    assert len({json.dumps(r["supervision"]) for r in records}) == 4
    assert [s.name for s in data.unseen] == ["unseen1"]


def test_splits_and_sites_hold_different_anatomies() -> None:
    data = load("phantom", appearance=0.0, **SMALL)
    pictures = Split.concat([p for s in (*data.sites, *data.unseen) for p in (s.train, s.val, s.test)]).images.flatten(
        1
    )
    assert len(torch.unique(pictures, dim=0)) == 4 * 11


def test_more_sites_or_more_images_do_not_change_the_others() -> None:
    few, many = load("phantom", **SMALL), load("phantom", **{**SMALL, "sites": 4, "per_site": 9})
    assert torch.equal(few.sites[2].test.images, many.sites[2].test.images)
    assert torch.equal(few.unseen[0].test.images, many.unseen[0].test.images)


def test_a_sample_has_the_promised_form_and_every_class() -> None:
    images, masks = sample(20, 64, generator(0))
    assert images.shape == (20, 3, 64, 64) and images.dtype == torch.float32
    assert masks.shape == (20, 64, 64) and masks.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 2])
    assert masks.unique().tolist() == list(range(len(CLASSES)))
    for label in range(1, len(CLASSES)):
        assert (masks == label).flatten(1).any(1).float().mean() > 0.9


def test_every_class_survives_every_site_of_some_seeds() -> None:
    for seed in range(4):
        for site in load("phantom", seed=seed, appearance=0.0, supervision=1.0, per_site=8, val=2, test=2).sites:
            assert site.train.masks.unique().tolist() == list(range(len(CLASSES)))


def test_randomised_samples_vary_widely() -> None:
    plain, masks = sample(64, 32, generator(0))
    wide, same = sample(64, 32, generator(0), randomise=True)
    assert wide.mean((1, 2, 3)).std() > 4 * plain.mean((1, 2, 3)).std()
    assert masks.shape == same.shape


def test_any_size_shows_the_same_proportions() -> None:
    shares = [(sample(40, size, generator(0))[1] > 0).float().mean() for size in (33, 64, 96)]
    assert max(shares) - min(shares) < 0.02


def test_shifts_can_be_given_site_by_site() -> None:
    data = load("phantom", appearance=[0, {"gamma": 2.0}, Appearance(blur=1.0), 1.0], **SMALL)
    assert data.sites[1].record["appearance"]["gamma"] == 2.0
    assert data.sites[2].record["appearance"] == Appearance(blur=1.0).record()
    with pytest.raises(FedloraError, match="lists 2 sites, but there are 4"):
        load("phantom", appearance=[0, 1], **SMALL)


@pytest.mark.parametrize("bad", [{"size": 12}, {"sites": 0}, {"unseen": -1}, {"per_site": 0}])
def test_impossible_sizes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(FedloraError):
        load("phantom", **{**SMALL, **bad})
