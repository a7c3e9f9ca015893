"""Procedural abdomen: five organs as signed distances, an image painted from them, and a site's shift on either side.

image = appearance_k(paint(anatomy)), mask = supervision_k(anatomy). Nothing here is a patient: organ names say which
shape is meant. Every image is a function of (seed, site, split, number), so that the four cells of the 2x2 (no shift,
appearance, supervision, both) hold the same anatomies and a comparison between them is paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.data.seeds import generator
from fedlora_mini.data.shift import (
    UNSEEN,
    Appearance,
    Supervision,
    apply_appearance,
    apply_supervision,
    random_appearance,
    site_shifts,
)
from fedlora_mini.data.supervision import SOFTNESS, membership
from fedlora_mini.errors import FedloraError

CLASSES = ("background", "liver", "kidneys", "vessel", "bladder", "lesion")
LAYERS = ("liver", "kidneys", "bladder", "vessel", "lesion")  # painted in this order, later over earlier
LABELS = tuple(CLASSES.index(name) for name in LAYERS)
RIMMED = (LAYERS.index("liver"), LAYERS.index("bladder"))  # organs with a wall that an annotator may leave out
SOFT = (LAYERS.index("lesion"),)  # fades into its surroundings: drawn where its membership passes a threshold
WALL = 2.0  # thickness of that wall, pixels at 64
CHUNK = 64  # images at a time: keeps the working set in the cache


@dataclass(frozen=True)
class Anatomy:
    """`organs` (N, 5, H, W) and `body`, `spine` (N, H, W): signed distances in pixels; these two carry no label."""

    organs: Tensor
    body: Tensor
    spine: Tensor


def draw_anatomy(n: int, size: int, rng: torch.Generator) -> Anatomy:
    """Random shapes at roughly fixed places. Coordinates run from -1 to 1, so distances are multiplied by size / 2."""

    def u(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=rng))[:, None, None]

    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turn, zoom = u(-0.2, 0.2), u(0.9, 1.08)
    px, py = (x - u(-0.06, 0.06)) / zoom, (y - u(-0.06, 0.06)) / zoom
    px, py = px * torch.cos(turn) + py * torch.sin(turn), py * torch.cos(turn) - px * torch.sin(turn)  # (N, H, W)

    def blob(cx: Tensor, cy: Tensor, a: Tensor, b: Tensor, tilt: Tensor, rough: float) -> Tensor:
        """d = (|q| - R(theta)) sqrt(ab), q the point in the ellipse's own units, R = 1 + a few harmonics."""
        dx, dy = px - cx, py - cy
        qx, qy = (dx * torch.cos(tilt) + dy * torch.sin(tilt)) / a, (dy * torch.cos(tilt) - dx * torch.sin(tilt)) / b
        theta, radius = torch.atan2(qy, qx), torch.ones(())
        for k in (2, 3, 4):
            radius = radius + rough / k * u(-1, 1) * torch.cos(k * theta + u(0, 2 * math.pi))
        return (torch.sqrt(qx**2 + qy**2) - radius) * torch.sqrt(a * b)

    body = blob(u(-0.02, 0.02), u(-0.02, 0.02), u(0.84, 0.92), u(0.68, 0.76), u(-0.05, 0.05), 0.08)
    spine = blob(u(-0.03, 0.03), u(0.42, 0.48), u(0.1, 0.13), u(0.09, 0.11), u(-0.3, 0.3), 0.1)
    lx, ly, la, lb = u(-0.44, -0.34), u(-0.22, -0.1), u(0.28, 0.38), u(0.24, 0.32)
    liver = blob(lx, ly, la, lb, u(-0.6, 0.6), 0.4)
    apart, level = u(0.38, 0.48), u(0.26, 0.36)
    right = blob(-apart, level + u(-0.04, 0.04), u(0.1, 0.14), u(0.15, 0.2), u(0.2, 0.6), 0.15)
    left = blob(apart, level + u(-0.04, 0.04), u(0.1, 0.14), u(0.15, 0.2), u(-0.6, -0.2), 0.15)
    bladder = blob(u(0.38, 0.5), u(-0.26, -0.12), u(0.18, 0.25), u(0.18, 0.25), u(-1, 1), 0.06)

    # The vessel is a graph x = c(y) with a branch y = c(x): the distance is the offset times the cosine of its slope.
    x0, swing, phase, bend, radius = u(-0.02, 0.12), u(0.03, 0.09), u(0, 6.3), u(3, 6), u(0.062, 0.08)
    centre, slope = x0 + swing * torch.sin(bend * py + phase), swing * bend * torch.cos(bend * py + phase)
    trunk = torch.maximum((px - centre).abs() / torch.sqrt(1 + slope**2) - radius, torch.maximum(-0.56 - py, py - 0.3))
    fork, drop = u(-0.42, 0.1), u(0.3, 0.8)
    run = px - x0
    branch = torch.maximum(
        (py - fork - drop * run**2).abs() / torch.sqrt(1 + (2 * drop * run) ** 2) - 0.8 * radius,
        torch.maximum(-run, run - u(0.3, 0.42)),
    )
    vessel = torch.minimum(trunk, branch)

    where, how_far = u(0, 2 * math.pi), u(0, 0.6)
    lesion = blob(
        lx + how_far * la * torch.cos(where),
        ly + how_far * lb * torch.sin(where),
        u(0.1, 0.19),
        u(0.1, 0.17),
        u(-1, 1),
        0.25,
    )
    organs = torch.stack([liver, torch.minimum(right, left), bladder, vessel, lesion], 1)
    half = size / 2
    return Anatomy(organs * half, body * half, spine * half)


def paint(anatomy: Anatomy, rng: torch.Generator) -> Tensor:
    """The un-shifted image (N, 1, H, W): tones laid over one another with soft edges, plus a smooth tissue texture."""
    n, _, size, _ = anatomy.organs.shape
    px = size / 64

    def tone(mean: float, spread: float = 0.04) -> Tensor:
        return mean + spread * (2 * torch.rand(n, 1, 1, generator=rng) - 1)

    def over(image: Tensor, distance: Tensor, value: Tensor, softness: float = 0.5) -> Tensor:
        weight = membership(distance, softness * px)
        return image + weight * (value - image)

    liver, kidneys, bladder, vessel, lesion = anatomy.organs.unbind(1)
    image = over(tone(0.03, 0.02), anatomy.body, tone(0.55))  # skin
    image = over(image, anatomy.body + 1.5 * px, tone(0.26))  # fat
    image = over(image, anatomy.body + 4 * px, tone(0.38))  # soft tissue
    image = over(image, anatomy.spine, tone(0.9))
    image = over(image, liver, tone(0.64))  # its capsule
    image = over(image, liver + WALL * px, tone(0.52))
    image = over(image, kidneys, tone(0.72))
    image = over(image, bladder, tone(0.48))  # its wall
    image = over(image, bladder + WALL * px, tone(0.14))
    image = over(image, vessel, tone(0.88))
    image = over(image, lesion, tone(0.22), SOFTNESS)
    inside = membership(anatomy.body, px)
    texture = torch.zeros(())
    for cells, weight in ((6, 0.025), (16, 0.02), (32, 0.012)):
        field = torch.randn(n, 1, cells, cells, generator=rng)
        texture = texture + weight * F.interpolate(field, size=(size, size), mode="bicubic", align_corners=False)[:, 0]
    return (image + inside * texture).clamp(0, 1)[:, None]


def sample(
    n: int,
    size: int = 64,
    rng: torch.Generator | None = None,
    *,
    appearance: Appearance | None = None,
    supervision: Supervision | None = None,
    randomise: bool = False,
) -> tuple[Tensor, Tensor]:
    """n labelled images: (n, 3, size, size) float32 in [0, 1] and (n, size, size) uint8 with the values of `CLASSES`.

    Without a shift this is the un-shifted domain. `randomise` gives every image its own wide appearance (and the
    reference annotation): data for a pre-training that should transfer. rng: generator(0) if not given.
    """
    rng = generator(0) if rng is None else rng
    images, masks = [], []
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        anatomy = draw_anatomy(count, size, rng)
        image = paint(anatomy, rng)
        shift = random_appearance(count, rng) if randomise else appearance
        images.append(image if shift is None else apply_appearance(image, shift, rng))
        masks.append(
            apply_supervision(anatomy.organs, supervision or Supervision(), RIMMED, SOFT, rim_width=WALL, labels=LABELS)
        )
    return torch.cat(images).expand(-1, 3, -1, -1).contiguous(), torch.cat(masks)


def load_phantom(
    size: int = 64,
    seed: int = 0,
    *,
    n_sites: int = 4,
    n_unseen: int = 1,
    per_site: int = 64,
    val: int = 16,
    test: int = 48,
    appearance: float | Sequence[Any] = 1.0,
    supervision: float | Sequence[Any] = 0.0,
) -> Dataset:
    """A simulated federation. `appearance` and `supervision` are strengths, or one strength, mapping or shift per site.

    per_site, val, test: images in a site's three splits. Unseen sites have shifts of their own and never train.
    """
    if size < 16:
        raise FedloraError(f"the phantom needs at least 16 pixels, got size={size}")
    for name, value in {"n_sites": n_sites, "per_site": per_site, "val": val, "test": test}.items():
        if value < 1:
            raise FedloraError(f"the phantom's {name} must be at least 1, got {value}")
    if n_unseen < 0:
        raise FedloraError(f"the phantom's n_unseen must be at least 0, got {n_unseen}")
    sites = []
    for k, look, rule in site_shifts(seed, n_sites, n_unseen, appearance, supervision):
        parts = [
            Split(*sample(count, size, generator(seed, k, part), appearance=look, supervision=rule))
            for part, count in enumerate((per_site, val, test))
        ]
        record = {
            "origin": "simulated",
            "seed": seed,
            "index": k,
            "appearance": look.record(),
            "supervision": rule.record(),
        }
        name = f"site{k + 1}" if k < UNSEEN else f"unseen{k - UNSEEN + 1}"
        sites.append(Site(name, parts[0], parts[1], parts[2], record))
    return Dataset(
        name="phantom",
        sites=tuple(sites[:n_sites]),
        unseen=tuple(sites[n_sites:]),
        classes=CLASSES,
        note="Simulated anatomy and simulated sites; every site's shift is in its record.",
        licence="generated by this package (MIT)",
    )
