"""How much of a disagreement an even rule explains, all of it for discs, little for halves; the stored lines again."""

import json
from pathlib import Path

import pytest
import torch

from fedlora_mini.data import lidc
from fedlora_mini.experiments import raters

STORED = Path(__file__).parents[2] / "results" / "raters.jsonl"


def disc(radius, side=48):
    y, x = torch.meshgrid(*[torch.arange(side) - side / 2] * 2, indexing="ij")
    return ((y**2 + x**2) ** 0.5 <= radius).to(torch.uint8)


def test_an_even_move_reconciles_discs_of_different_size():
    before, after = raters.even(torch.stack([disc(8), disc(12)])[None])
    assert before < 0.65 and after > 0.95


def test_it_does_not_reconcile_halves_of_one_disc():
    half = torch.arange(48)[:, None] < 24
    before, after = raters.even(torch.stack([disc(12) * half, disc(12) * ~half])[None])
    assert before == 0 and after < 0.6


def test_two_empty_outlines_agree_and_an_empty_one_cannot_grow():
    none = torch.zeros(48, 48, dtype=torch.uint8)
    assert raters.even(torch.stack([none, none])[None]) == (1.0, 1.0)
    assert raters.even(torch.stack([none, disc(5)])[None]) == (0.0, 0.5)  # the disc shrinks to nothing


def stored():
    return [json.loads(line) for line in STORED.read_text(encoding="utf-8").splitlines()]


def test_the_stored_simulation_made_again_gives_the_same_numbers():
    told = next(r for r in stored() if r["strength"] == 0.3)
    new = raters.measure(raters.simulated(0.3)[:60])
    assert new["dice"] == told["dice"][:60]


@pytest.mark.slow
def test_the_stored_readers_made_again_give_the_same_numbers():
    if not lidc.ready(lidc.SIDE):
        pytest.skip("lidc is not on this machine: fedlora data fetch lidc")
    told = stored()[0]
    masks = lidc.raters(lidc.SIDE)[1]
    assert told["objects"] == len(masks)
    assert raters.measure(masks[:20])["dice"] == told["dice"][:20]
