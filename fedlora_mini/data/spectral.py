"""x' = F^-1([(1 - mu) |F(x)| + mu A]_low + |F(x)|_high, angle F(x)): an image in another site's style.

The phase (where things are) stays, the low-frequency amplitude (brightness, contrast, shading) moves towards A.
Source: Yang and Soatto, Fourier domain adaptation, CVPR 2020; Liu et al., FedDG, CVPR 2021.
"""

import torch
from torch import Tensor


def amplitude_spectrum(images: Tensor) -> Tensor:
    """|F(x)| over the last two axes, zero frequency first: (..., H, W) -> (..., H, W)."""
    return torch.fft.fft2(images).abs()


def mean_amplitude(images: Tensor) -> Tensor:
    """A = mean over images of |F(x)|, what a site would send: (N, C, H, W) -> (C, H, W)."""
    return amplitude_spectrum(images).mean(0)


def low_frequency_window(height: int, width: int, ratio: float) -> Tensor:
    """1 where |u|, |v| <= floor(ratio min(H, W)), else 0: (H, W). Ratio 0 keeps the mean (zero frequency) alone."""
    edge = int(ratio * min(height, width))
    u = torch.fft.fftfreq(height, d=1 / height).abs().round()  # whole cycles over the image
    v = torch.fft.fftfreq(width, d=1 / width).abs().round()
    return ((u[:, None] <= edge) & (v[None, :] <= edge)).float()


def low_frequency_swap(
    images: Tensor, amplitude: Tensor, ratio: float = 0.05, mixing: "float | Tensor" = 1.0
) -> Tensor:
    """Moves the low-frequency amplitude of `images` a share `mixing` of the way to `amplitude`; not clipped.

    images (..., H, W); amplitude broadcasts against it; mixing a number or a tensor that broadcasts, in [0, 1].
    With mixing 0, or with the image's own amplitude, the result is the image (to rounding).
    """
    spectrum = torch.fft.fft2(images)
    own = spectrum.abs()
    window = low_frequency_window(images.shape[-2], images.shape[-1], ratio).to(own)
    target = own + mixing * window * (amplitude - own)
    return torch.fft.ifft2(torch.polar(target.expand_as(own).contiguous(), spectrum.angle())).real


def low_frequencies(images: Tensor, ratio: float) -> Tensor:
    """The mean amplitude inside the window, zero outside: no more than others' swaps read. (C, H, W)."""
    amplitude = mean_amplitude(images)
    height, width = amplitude.shape[-2:]
    return amplitude * low_frequency_window(height, width, ratio).to(amplitude)
