"""Supervision shift: how a site's annotators draw the same anatomy. Masks change, images do not.

All three rules move an outline, so they are one offset on a signed distance: grow by g pixels, leave out a wall of
width w, or threshold a soft membership sigmoid(-d / s) at t, which is d <= -s logit(t). Lengths are pixels of a
64-pixel image.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.data.appearance import REFERENCE, check_strength

SOFTNESS = 1.5  # pixels from the outline at which a soft membership is 0.27 outside and 0.73 inside


@dataclass(frozen=True)
class Supervision:
    """How a site's annotators draw the same anatomy."""

    grow: float = 0.0  # every outline moved outwards by this many pixels (negative: inwards)
    rim: float = 0.0  # outline of the organs with a wall: 0 = wall included, 1 = left out, -1 = a margin outside too
    threshold: float = 0.5  # a soft structure (lesion) is drawn where its membership is at least this

    def scaled(self, strength: float) -> "Supervision":
        """grow, rim and (threshold - 1/2) times s; the threshold stays inside [0.02, 0.98]."""
        s = check_strength(strength)
        threshold = min(max(0.5 + s * (self.threshold - 0.5), 0.02), 0.98)
        return Supervision(grow=self.grow * s, rim=self.rim * s, threshold=threshold)

    def record(self) -> dict[str, Any]:
        """The knobs as plain numbers: goes through JSON unchanged, and Supervision(**record) is equal."""
        return asdict(self)


def signed_distance(masks: Tensor) -> Tensor:
    """d < 0 inside, d > 0 outside, |d| = Euclidean pixels to the outline: bool (..., H, W) -> float32.

    Exact, by SciPy, half a pixel off the grid: the outline lies between pixels. An empty mask is +inf everywhere.
    """
    from scipy.ndimage import distance_transform_edt

    flat = masks.bool().reshape(-1, *masks.shape[-2:]).numpy()
    out = torch.empty(flat.shape)
    for i, mask in enumerate(flat):
        if not mask.any():
            out[i] = math.inf
        elif mask.all():
            out[i] = -math.inf
        else:
            outside, inside = distance_transform_edt(~mask), distance_transform_edt(mask)
            out[i] = torch.from_numpy((outside - 0.5) * ~mask - (inside - 0.5) * mask)
    return out.reshape(masks.shape)


def membership(distance: Tensor, softness: float) -> Tensor:
    """sigmoid(-d / softness): 1/2 on the outline, towards 1 inside."""
    return torch.sigmoid(-distance / softness)


def apply_supervision(
    distance: Tensor,
    rule: Supervision,
    rimmed: Sequence[int] = (),
    soft: Sequence[int] = (),
    rim_width: float = 2.0,
    labels: Sequence[int] | None = None,
) -> Tensor:
    """mask = label of the last layer l with d_l <= grow - rim w [l has a wall] - s logit(threshold) [l is soft].

    distance (N, L, H, W): signed distances of the anatomy's layers in pixels, painted in order, so that a layer covers
    those before it and a layer that shrinks shows what lies under it. `rimmed` and `soft` name layers; `rim_width` is
    the wall's w in pixels at 64. labels: the value of each layer, 1..L if not given. Returns (N, H, W) uint8.
    {membership >= t} is {d <= -s logit(t)}: a threshold on a soft membership moves that layer's outline.
    """
    n, layers, height, width = distance.shape
    scale = height / REFERENCE
    values = range(1, layers + 1) if labels is None else labels
    mask = torch.zeros(n, height, width, dtype=torch.uint8)
    for layer, value in enumerate(values):
        offset = rule.grow
        if layer in rimmed:
            offset = offset - rule.rim * rim_width
        if layer in soft:
            offset = offset - SOFTNESS * math.log(rule.threshold / (1 - rule.threshold))
        mask[distance[:, layer] <= offset * scale] = value
    return mask
