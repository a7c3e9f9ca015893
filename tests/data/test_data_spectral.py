"""The amplitude swap keeps the phase, is the identity where it must be, and moves only the window."""

import torch

from fedlora_mini.data.phantom import sample
from fedlora_mini.data.seeds import generator
from fedlora_mini.data.spectral import amplitude_spectrum, low_frequency_swap, low_frequency_window, mean_amplitude


def pictures() -> torch.Tensor:
    return sample(6, 32, generator(0))[0]


def test_mixing_zero_and_the_own_amplitude_are_the_identity() -> None:
    x = pictures()
    other = mean_amplitude(x)
    assert torch.allclose(low_frequency_swap(x, other, 0.1, mixing=0.0), x, atol=1e-6)
    assert torch.allclose(low_frequency_swap(x, amplitude_spectrum(x), 0.1, mixing=1.0), x, atol=1e-6)


def test_a_full_swap_has_the_targets_amplitude_inside_the_window_and_its_own_outside() -> None:
    x = pictures()
    target = mean_amplitude(x)
    swapped = amplitude_spectrum(low_frequency_swap(x, target, 0.1))
    inside = low_frequency_window(32, 32, 0.1).bool()
    assert torch.allclose(swapped[..., inside], target.expand_as(swapped)[..., inside], atol=1e-2)
    assert torch.allclose(swapped[..., ~inside], amplitude_spectrum(x)[..., ~inside], atol=1e-3)


def test_ratio_zero_moves_the_mean_alone() -> None:
    x = pictures()
    assert low_frequency_window(32, 32, 0.0).sum() == 1
    swapped = low_frequency_swap(x, mean_amplitude(x), 0.0)
    assert torch.allclose(swapped - swapped.mean((2, 3), keepdim=True), x - x.mean((2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(swapped.mean((0, 2, 3)), x.mean((0, 2, 3)), atol=1e-5)


def test_the_window_is_the_centred_square_of_the_definition() -> None:
    shifted = torch.fft.fftshift(low_frequency_window(40, 64, 0.1))
    expected = torch.zeros(40, 64)
    expected[20 - 4 : 20 + 5, 32 - 4 : 32 + 5] = 1
    assert torch.equal(shifted, expected)
