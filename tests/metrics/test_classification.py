"""Accuracy, recall and cross-entropy against scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score

from fedlora_mini.data import load
from fedlora_mini.losses import segmentation_loss, task_loss
from fedlora_mini.metrics import recognise, recognition
from fedlora_mini.models import load_base

NAMES = tuple("abcd")


def test_the_numbers_are_scikit_learns():
    g = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(50, 4, generator=g), torch.randint(0, 4, (50,), generator=g).to(torch.uint8)
    found = recognition(logits, truth, NAMES)
    guess = logits.argmax(1)
    assert found.accuracy == pytest.approx(accuracy_score(truth, guess))
    assert list(found.per_class.values()) == pytest.approx(recall_score(truth, guess, average=None).tolist())
    assert found.loss == pytest.approx(log_loss(truth, logits.double().softmax(1), labels=range(4)), rel=1e-6)


def test_a_class_that_is_not_there_has_no_recall():
    found = recognition(torch.eye(4)[:2], torch.tensor([0, 3]), NAMES)
    assert found.accuracy == 0.5 and math.isnan(found.per_class["b"]) and found.per_class["d"] == 0


def test_the_loss_is_chosen_by_what_has_a_label():
    g = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(5, 4, generator=g), torch.tensor([0, 1, 2, 3, 3], dtype=torch.uint8)
    expected = torch.nn.functional.cross_entropy(logits, truth.long(), reduction="none")
    assert torch.equal(task_loss(logits, truth), expected)
    masks, pixels = torch.randint(0, 4, (2, 6, 6), generator=g), torch.randn(2, 4, 6, 6, generator=g)
    assert torch.equal(task_loss(pixels, masks), segmentation_loss(pixels, masks))


def test_the_base_knows_mirrored_negatives_and_not_the_clients_digits():
    model, data = load_base("vit", 10, (12, 12), same_task=True), load("digits", size=12)
    split = data.sites[0].test
    foreign = type(split)(1 - split.images.flip(3), split.masks)
    assert recognise(model, {}, foreign, data.classes).accuracy > 0.8
    assert recognise(model, {}, split, data.classes).accuracy < 0.15, "adaptation is needed"
