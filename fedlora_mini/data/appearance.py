"""Appearance shift: how a site's scanner shows the same anatomy. Images change, masks do not.

Every knob has an identity value at which nothing happens, bit for bit; `scaled(s)` moves all knobs a share s of the way
from identity to their value. Lengths are pixels of a 64-pixel image and grow with the image. Channels are not mixed:
the phantom is grey, and mixed copies of one channel are gains; `experiments.tissues` mixes the channels of tissues.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora_mini.data.seeds import generator
from fedlora_mini.data.spectral import amplitude_spectrum, low_frequency_swap
from fedlora_mini.errors import FedloraError

REFERENCE = 64  # lengths are given in pixels of an image of this height
LOW = 0.05  # half width of the low-frequency window, as a share of the image (beta of FedDG)
Knob = float | Tensor  # one value, or one for every image: (N,)


@dataclass(frozen=True)
class Appearance:
    """How a site's scanner shows the same anatomy."""

    gamma: Knob = 1.0  # x ** gamma: above 1 darkens the middle tones
    invert: Knob = 0.0  # 1 = negative (1 - x); in between the brightest tone is at 1 - invert
    bias: Knob = 0.0  # log gain at the edge of a ramp across the image, as a surface coil gives
    bias_angle: Knob = 0.0  # direction of that ramp, radians
    blur: Knob = 0.0  # Gaussian standard deviation, pixels at 64
    noise: Knob = 0.0  # standard deviation of white Gaussian noise
    low_frequency: Knob = 0.0  # how far the low-frequency amplitude moves to the style's, 0..1
    style: int = 0  # which style image that amplitude comes from

    def scaled(self, strength: float) -> "Appearance":
        """gamma ** s; every other strength times s. Direction and style stay."""
        s = check_strength(strength)
        return Appearance(
            gamma=self.gamma**s,
            invert=_at_most_one(self.invert * s),
            bias=self.bias * s,
            bias_angle=self.bias_angle,
            blur=self.blur * s,
            noise=self.noise * s,
            low_frequency=_at_most_one(self.low_frequency * s),
            style=self.style,
        )

    def record(self) -> dict[str, Any]:
        """The knobs as plain numbers or lists: goes through JSON unchanged, and Appearance(**record) is equal."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(self).items()}


def gamma_curve(x: Tensor, gamma: Knob) -> Tensor:
    """x ** gamma."""
    return x ** _each(gamma, x)


def invert_contrast(x: Tensor, w: Knob) -> Tensor:
    """x / (1 - w) below the peak tone 1 - w, (1 - x) / w above it: the identity at w = 0, the negative 1 - x at w = 1.

    A straight mixture (1 - w) x + w (1 - x) would be a constant grey at w = 1/2; a travelling peak keeps contrast.
    """
    w = _each(w, x)
    rising = (x < 1 - w) | (w == 0)
    return torch.where(rising, x / (1 - w).clamp(min=1e-6), (1 - x) / w.clamp(min=1e-6))


def bias_field(x: Tensor, amplitude: Knob, angle: Knob = 0.0) -> Tensor:
    """x exp(amplitude (u cos angle + v sin angle)), u and v from -1 to 1 across the image."""
    v = torch.linspace(-1, 1, x.shape[-2])[:, None]
    u = torch.linspace(-1, 1, x.shape[-1])[None, :]
    angle = _each(angle, x)
    return x * torch.exp(_each(amplitude, x) * (u * torch.cos(angle) + v * torch.sin(angle)))


def blur(x: Tensor, sigma: Knob) -> Tensor:
    """Gaussian blur, sigma in pixels of this image, edges reflected."""
    n, channels, height, width = x.shape
    sigma = _each(sigma, x).reshape(-1, 1).clamp(min=1e-3)  # at 1e-3 the kernel is exactly a one between zeros
    radius = min(max(1, math.ceil(3 * float(sigma.max()))), min(height, width) - 1)
    offset = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)  # (N or 1, k)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).expand(n, -1).repeat_interleave(channels, 0)  # (N C, k)
    y = F.pad(x, [radius] * 4, mode="reflect").reshape(1, n * channels, height + 2 * radius, width + 2 * radius)
    y = F.conv2d(y, kernel[:, None, None, :], groups=n * channels)
    y = F.conv2d(y, kernel[:, None, :, None], groups=n * channels)
    return y.reshape(n, channels, height, width)


def add_noise(x: Tensor, sigma: Knob, rng: torch.Generator) -> Tensor:
    """x + sigma z, z ~ N(0, 1) from `rng`."""
    return x + _each(sigma, x) * torch.randn(x.shape, generator=rng)


def style_image(style: int, height: int, width: int) -> Tensor:
    """A smooth random picture (1, H, W) that stands for a site's brightness and shading; fixed by its number."""
    rng = generator(style, 77)
    field = F.interpolate(
        torch.randn(1, 1, 6, 6, generator=rng), size=(height, width), mode="bicubic", align_corners=False
    )
    level = 0.1 + 0.35 * torch.rand(1, generator=rng)
    return (level + 0.15 * field[0]).clamp(0, 1)


def apply_appearance(images: Tensor, appearance: Appearance, rng: torch.Generator) -> Tensor:
    """low frequency -> gamma -> inversion -> bias field -> blur -> noise, clipped to [0, 1]: (N, C, H, W) -> the same.

    Where a knob holds one value an image, every image gets its own. Noise is the only use of `rng`.
    """
    a, height, width = appearance, images.shape[-2], images.shape[-1]
    x = images
    if _on(a.low_frequency):
        amplitude = amplitude_spectrum(style_image(a.style, height, width))
        x = low_frequency_swap(x, amplitude, LOW, _each(a.low_frequency, x)).clamp(0, 1)
    if _on(a.gamma, identity=1.0):
        x = gamma_curve(x, a.gamma)
    if _on(a.invert):
        x = invert_contrast(x, a.invert)
    if _on(a.bias):
        x = bias_field(x, a.bias, a.bias_angle)
    if _on(a.blur):
        x = blur(x, torch.as_tensor(a.blur) * (height / REFERENCE))
    if _on(a.noise):
        x = add_noise(x, a.noise, rng)
    return x.clamp(0, 1)


def _each(value: Knob, x: Tensor) -> Tensor:
    """A knob that broadcasts over images: () or (N, 1, 1, 1)."""
    value = torch.as_tensor(value, dtype=x.dtype)
    return value if value.ndim == 0 else value.reshape(-1, 1, 1, 1)


def _on(value: Knob, identity: float = 0.0) -> bool:
    return bool((torch.as_tensor(value) != identity).any())


def _at_most_one(value: Knob) -> Knob:
    return value.clamp(max=1.0) if isinstance(value, Tensor) else min(value, 1.0)


def check_strength(strength: float) -> float:
    if not (math.isfinite(strength) and strength >= 0):
        raise FedloraError(f"a shift's strength is a finite number of at least 0, got {strength}")
    return strength
