"""One amplitude for all: the spectrum by numpy, and that training sees what testing sees."""

import numpy as np
import pytest
import torch

from fedlora_mini.data.spectral import mean_amplitude
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sharing import everything
from fedlora_mini.regularizers.harmony import Harmonised


def images(seed, n=2, side=16):
    """Smooth ones, away from the ends of [0, 1], so that nothing is clipped."""
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return 0.4 + 0.2 * torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def by_numpy(x, amplitude, ratio):
    """Frequency by frequency."""
    out = np.empty(x.shape)
    side = x.shape[-1]
    edge = int(ratio * side)
    for n, c in np.ndindex(*x.shape[:2]):
        spectrum = np.fft.fft2(x[n, c].numpy().astype(np.float64))
        for u, v in np.ndindex(side, side):
            if min(u, side - u) <= edge and min(v, side - v) <= edge:
                spectrum[u, v] = amplitude[c, u, v].item() * np.exp(1j * np.angle(spectrum[u, v]))
        out[n, c] = np.fft.ifft2(spectrum).real
    return torch.from_numpy(out.clip(0, 1)).float()


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.2])
def test_the_amplitude_is_exchanged_inside_the_window(ratio):
    x, common = images(0), mean_amplitude(images(1))
    found = Harmonised(ratio).images(x, {"~amplitude": common})
    torch.testing.assert_close(found, by_numpy(x, common, ratio), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, x, atol=1e-3)


def test_with_its_own_amplitude_an_image_is_itself():
    x = images(0, n=1)
    found = Harmonised(0.3).images(x, {"~amplitude": mean_amplitude(x)})
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)


def test_before_there_is_a_common_amplitude_images_stay():
    x = images(0)
    assert Harmonised().images(x, {"~other": x}) is x


def test_images_stay_in_their_range():
    dark, bright = 0.05 * images(0), mean_amplitude(torch.ones(1, 3, 16, 16)) * 1.3
    found = Harmonised().images(dark, {"~amplitude": bright})
    assert found.min() >= 0 and found.max() == 1


def test_it_does_not_depend_on_the_batch():
    """So that training and testing agree whatever the batch: image by image the same, and in a row's `images`."""
    x, notes = images(0, n=4), {"~amplitude": mean_amplitude(images(1))}
    row = Method("", "full", everything, objective=(Harmonised(),))
    whole = row.images(x, notes)
    for i in range(4):
        torch.testing.assert_close(row.images(x[i : i + 1], notes), whole[i : i + 1])
    assert torch.equal(whole, Harmonised().images(x, notes))
