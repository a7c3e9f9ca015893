"""Each knob does its one thing, nothing at its identity, and never touches the other side of the pair."""

import json
from dataclasses import fields, replace

import pytest
import torch

from fedlora_mini.data.appearance import (
    Appearance,
    add_noise,
    apply_appearance,
    bias_field,
    blur,
    gamma_curve,
    invert_contrast,
)
from fedlora_mini.data.phantom import LABELS, RIMMED, SOFT, draw_anatomy, sample
from fedlora_mini.data.seeds import generator
from fedlora_mini.data.shift import as_shift, random_appearance, site_appearance, site_supervision
from fedlora_mini.data.supervision import SOFTNESS, Supervision, apply_supervision, membership, signed_distance
from fedlora_mini.errors import FedloraError

APPEARANCE = {"gamma": 2.0, "invert": 1.0, "bias": 0.5, "blur": 1.0, "noise": 0.05, "low_frequency": 0.4}
SUPERVISION = {"grow": 1.0, "rim": 1.0, "threshold": 0.8}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return sample(4, 48, generator(5))[0][:, :1].contiguous()


def test_every_knob_is_in_these_tests() -> None:
    assert {f.name for f in fields(Appearance)} == {*APPEARANCE, "bias_angle", "style"}
    assert {f.name for f in fields(Supervision)} == set(SUPERVISION)


@pytest.mark.parametrize("knob", APPEARANCE)
def test_an_appearance_knob_changes_images_and_no_mask(knob: str) -> None:
    shift = Appearance(**{knob: APPEARANCE[knob]})
    plain, mask = sample(4, 48, generator(1))
    shifted, same = sample(4, 48, generator(1), appearance=shift)
    assert (plain - shifted).abs().max() > 0.02
    assert torch.equal(mask, same)
    assert shifted.min() >= 0 and shifted.max() <= 1


@pytest.mark.parametrize("knob", SUPERVISION)
def test_a_supervision_knob_changes_masks_and_no_image(knob: str) -> None:
    shift = Supervision(**{knob: SUPERVISION[knob]})
    plain, mask = sample(4, 48, generator(1))
    same, shifted = sample(4, 48, generator(1), supervision=shift)
    assert torch.equal(plain, same)
    assert not torch.equal(mask, shifted)


@pytest.mark.parametrize("knob", APPEARANCE)
def test_appearance_at_strength_zero_is_the_identity_bit_for_bit(knob: str, images: torch.Tensor) -> None:
    shift = Appearance(**{knob: APPEARANCE[knob]}).scaled(0)
    assert torch.equal(apply_appearance(images, shift, generator(2)), images)


@pytest.mark.parametrize("knob", SUPERVISION)
def test_supervision_at_strength_zero_is_the_reference_annotation(knob: str) -> None:
    distance = draw_anatomy(4, 48, generator(3)).organs
    shift = Supervision(**{knob: SUPERVISION[knob]}).scaled(0)
    expected = apply_supervision(distance, Supervision(), RIMMED, SOFT)
    assert torch.equal(apply_supervision(distance, shift, RIMMED, SOFT), expected)


def test_each_tone_and_field_function_is_the_identity_at_its_identity(images: torch.Tensor) -> None:
    assert torch.equal(gamma_curve(images, 1.0), images)
    assert torch.equal(invert_contrast(images, 0.0), images)
    assert torch.equal(bias_field(images, 0.0, 1.0), images)
    assert torch.equal(blur(images, 0.0), images)
    assert torch.equal(add_noise(images, 0.0, generator(0)), images)


def test_full_inversion_is_the_negative_and_half_keeps_contrast(images: torch.Tensor) -> None:
    assert torch.allclose(invert_contrast(images, 1.0), 1 - images, atol=1e-6)
    assert invert_contrast(images, 0.5).std() > 0.5 * images.std()
    ends = torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3)
    assert torch.allclose(invert_contrast(ends, 0.75).flatten(), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


def test_blur_is_scipys_gaussian_filter(images: torch.Tensor) -> None:
    from scipy.ndimage import gaussian_filter

    expected = gaussian_filter(images[0, 0].numpy().astype("float64"), 1.3, mode="mirror", radius=4)
    assert torch.allclose(blur(images[:1], 1.3)[0, 0], torch.from_numpy(expected).float(), atol=1e-5)


def test_a_tensor_knob_gives_every_image_its_own_value(images: torch.Tensor) -> None:
    one_by_one = [
        apply_appearance(images[i : i + 1], Appearance(gamma=1 + i, blur=0.5 * i), generator(0)) for i in range(4)
    ]
    shift = Appearance(gamma=1 + torch.arange(4.0), blur=0.5 * torch.arange(4.0))
    assert torch.allclose(apply_appearance(images, shift, generator(0)), torch.cat(one_by_one), atol=1e-5)


def test_strength_moves_monotonically_and_does_not_move_the_style() -> None:
    full = site_appearance(0, 4)
    half = full.scaled(0.5)
    assert half.noise == pytest.approx(full.noise / 2) and half.gamma == pytest.approx(full.gamma**0.5)
    assert (half.style, half.bias_angle) == (full.style, full.bias_angle)
    assert full.scaled(1.0) == full
    rule = site_supervision(0, 4)
    assert rule.scaled(1.0).record() == pytest.approx(rule.record())
    assert rule.scaled(0.5).threshold - 0.5 == pytest.approx((rule.threshold - 0.5) / 2)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_an_impossible_strength_is_refused(strength: float) -> None:
    with pytest.raises(FedloraError, match="strength"):
        Appearance(gamma=2.0).scaled(strength)
    with pytest.raises(FedloraError, match="strength"):
        Supervision(grow=2.0).scaled(strength)


def test_records_go_through_json_and_back() -> None:
    for shift in (site_appearance(3, 1), site_supervision(3, 1)):
        assert type(shift)(**json.loads(json.dumps(shift.record()))) == shift
    json.dumps(random_appearance(3, generator(0)).record())


def test_sites_depend_on_seed_and_index_alone_and_are_spread_out() -> None:
    assert site_appearance(1, 2) == site_appearance(1, 2) != site_appearance(1, 3)
    assert site_supervision(1, 2) != site_supervision(2, 2)
    for seed in range(5):
        grows = [site_supervision(seed, k).grow for k in range(4)]
        assert max(grows) - min(grows) > 1.0
        gammas = [site_appearance(seed, k).gamma for k in range(4)]
        assert max(gammas) / min(gammas) > 1.8


def test_growing_dilates_and_a_negative_growth_erodes() -> None:
    distance = draw_anatomy(6, 64, generator(4)).organs
    sizes = [int((apply_supervision(distance, Supervision(grow=g)) > 0).sum()) for g in (-1.0, 0.0, 1.0, 2.0)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[3]


def test_leaving_out_the_rim_shrinks_the_walled_organs_only() -> None:
    distance = draw_anatomy(6, 64, generator(4)).organs
    whole = apply_supervision(distance, Supervision(), RIMMED, SOFT, labels=LABELS)
    inner = apply_supervision(distance, Supervision(rim=1.0), RIMMED, SOFT, labels=LABELS)
    walled = {LABELS[i] for i in RIMMED}
    for label in LABELS:
        before, after = int((whole == label).sum()), int((inner == label).sum())
        assert after < before if label in walled else after == before


def test_a_threshold_is_the_level_set_of_the_soft_membership() -> None:
    distance = draw_anatomy(6, 64, generator(4)).organs
    soft = SOFT[0]
    drawn = apply_supervision(distance, Supervision(threshold=0.8), RIMMED, SOFT) == soft + 1
    assert torch.equal(drawn, membership(distance[:, soft], SOFTNESS) >= 0.8)


def test_the_signed_distance_of_a_square_is_exact_and_its_sign_gives_the_mask_back() -> None:
    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[0, 4:12, 4:12] = True
    mask[1] = True
    distance = signed_distance(mask)
    assert torch.equal(distance <= 0, mask)
    assert distance[0, 4, 8] == -0.5 and distance[0, 3, 8] == 0.5 and distance[0, 0, 8] == 3.5
    assert torch.isinf(distance[2]).all()


def test_a_shift_can_be_a_strength_a_mapping_or_ready_made() -> None:
    default = site_appearance(0, 0)
    assert as_shift(Appearance, 0.5, default) == default.scaled(0.5)
    assert as_shift(Appearance, {"gamma": 2.0}, default) == Appearance(gamma=2.0)
    assert as_shift(Appearance, replace(default, blur=1.0), default).blur == 1.0
    with pytest.raises(FedloraError, match="Did you mean 'gamma'"):
        as_shift(Appearance, {"gama": 2.0}, default)
    with pytest.raises(FedloraError, match="strength"):
        as_shift(Supervision, "much", Supervision())
