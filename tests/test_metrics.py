import math

import pytest
import torch
from scipy.spatial.distance import directed_hausdorff

from fedlora_mini.data import IGNORE, Split
from fedlora_mini.metrics import evaluate, score

NAMES = ("background", "a", "b")


def disc(size, centre, radius):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def test_dice_is_two_overlap_over_sum_per_class():
    truth, found = torch.zeros(1, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8)
    truth[0][disc(32, (10, 10), 6)] = 1
    found[0][disc(32, (12, 10), 6)] = 1
    truth[0][disc(32, (24, 24), 4)] = 2
    s = score(found, truth, NAMES)
    t, f = truth == 1, found == 1
    assert s.per_class["a"] == pytest.approx((2 * (t & f).sum() / (t.sum() + f.sum())).item())
    assert s.per_class["b"] == 0.0
    assert s.dice == pytest.approx((s.per_class["a"] + 0.0) / 2)


def test_hd95_is_below_the_full_hausdorff_distance_and_exact_for_a_shift():
    truth, found = torch.zeros(1, 40, 40, dtype=torch.uint8), torch.zeros(1, 40, 40, dtype=torch.uint8)
    truth[0, 10:20, 10:20] = 1
    found[0, 10:20, 13:23] = 1
    points = [(m[0] == 1).nonzero().numpy() for m in (truth, found)]
    full = max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0])
    assert score(found, truth, NAMES[:2]).hd95 == pytest.approx(3.0) == full


def test_a_missing_surface_costs_the_diagonal_and_two_missing_cost_nothing():
    truth = torch.zeros(2, 16, 16, dtype=torch.uint8)
    truth[0, 4:8, 4:8] = 1
    s = score(torch.zeros_like(truth), truth, NAMES[:2])
    assert s.dice == 0.0 and s.hd95 == pytest.approx(16 * math.sqrt(2)) and s.false_alarms == 0.0


def test_false_alarms_count_images_whose_truth_is_empty():
    truth = torch.zeros(4, 16, 16, dtype=torch.uint8)
    truth[0, 4:8, 4:8] = 1
    found = truth.clone()
    found[1, 0, 0] = 1
    s = score(found, truth, NAMES[:2])
    assert s.dice == 1.0 and s.false_alarms == pytest.approx(1 / 3)


def test_ignored_pixels_change_nothing():
    truth = torch.zeros(1, 16, 16, dtype=torch.uint8)
    truth[0, 4:8, 4:8] = 1
    truth[0, 12:, :] = IGNORE
    found = truth.clone()
    found[0, 12:, :] = 1
    assert score(found, truth, NAMES[:2]).dice == 1.0


def test_evaluating_leaves_the_training_mode_as_it_was():
    model = torch.nn.Conv2d(1, 2, 1).train()
    split = Split(torch.rand(3, 1, 8, 8), torch.ones(3, 8, 8, dtype=torch.uint8))
    with torch.no_grad():
        model.weight.zero_(), model.bias.copy_(torch.tensor([0.0, 1.0]))
    assert evaluate(model, {}, split, NAMES[:2]).dice == 1.0
    assert model.training
