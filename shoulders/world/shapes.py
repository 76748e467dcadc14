"""The ten shape families: implicit functions of the plane, negative inside, about one unit in radius.

Each function takes coordinates (H, W) of any size and a *bend*, three numbers in [0, 1) that vary the shape within its
family. Its values need not be distances: `depth` converts them to pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
Bend = tuple[float, float, float]


def pebble(x: Field, y: Field, bend: Bend) -> Field:
    """A smooth blob."""
    angle = np.arctan2(y, x)
    swell = 0.16 * np.cos(2 * angle + 6.3 * bend[0]) + 0.07 * np.cos(3 * angle + 6.3 * bend[1])
    return np.hypot(x, y) - 0.85 * (1 + swell)


def triangle(x: Field, y: Field, bend: Bend) -> Field:
    """Three corners, the top one leaning."""
    lean = 0.5 * (bend[0] - 0.5)
    sides = [(np.cos(a), np.sin(a)) for a in (1.571, 3.665 + lean, 5.760 + lean)]
    return np.maximum.reduce([c * x + s * y for c, s in sides]) - 0.56


def brick(x: Field, y: Field, bend: Bend) -> Field:
    """A slanted rectangle."""
    slant = 0.5 * (bend[1] - 0.5)
    return np.maximum(np.abs(x - slant * y) - 0.92, np.abs(y) - (0.5 + 0.3 * bend[0]))


def star(x: Field, y: Field, bend: Bend) -> Field:
    """Four to six pointed rays."""
    rays = 4 + int(3 * bend[0])
    phase = np.arctan2(y, x) * np.float32(rays / (2 * np.pi)) % 1
    return np.hypot(x, y) - (0.38 + 0.72 * np.abs(2 * phase - 1) ** 1.4)


def flower(x: Field, y: Field, bend: Bend) -> Field:
    """Four to six round petals."""
    petals = 4 + int(3 * bend[0])
    wave = np.abs(np.cos(np.arctan2(y, x) * np.float32(petals / 2)))
    return np.hypot(x, y) - (0.36 + 0.62 * wave**0.6)


def ring(x: Field, y: Field, bend: Bend) -> Field:
    """A band around a hole."""
    return np.abs(np.hypot(x, y) - 0.76) - (0.2 + 0.1 * bend[0])


def moon(x: Field, y: Field, bend: Bend) -> Field:
    """A disc without a part of a second, smaller disc."""
    return np.maximum(np.hypot(x + 0.25, y) - 1.05, 0.85 - np.hypot(x - 0.4 - 0.15 * bend[0], y))


def cross(x: Field, y: Field, bend: Bend) -> Field:
    """Two bars, one over the middle of the other."""
    width = 0.24 + 0.12 * bend[0]
    bars = np.maximum(np.abs(x) - 1, np.abs(y) - width), np.maximum(np.abs(x) - width, np.abs(y) - 1)
    return np.minimum(*bars)


def heart(x: Field, y: Field, bend: Bend) -> Field:
    """Two lobes and a tip."""
    return np.hypot(x, y - 0.2 + (0.7 + 0.3 * bend[0]) * (0.45 - np.abs(x))) - 0.88


def arrow(x: Field, y: Field, bend: Bend) -> Field:
    """A wide head on a narrow shaft."""
    width = 0.16 + 0.12 * bend[0]
    head = np.maximum(0.05 - x, np.abs(y) + 0.95 * x - 0.95)
    shaft = np.maximum(np.abs(x + 0.42) - 0.62, np.abs(y) - width)
    return np.minimum(head, shaft)


SHAPES: dict[str, Callable[[Field, Field, Bend], Field]] = {
    "pebble": pebble,
    "triangle": triangle,
    "brick": brick,
    "star": star,
    "flower": flower,
    "ring": ring,
    "moon": moon,
    "cross": cross,
    "heart": heart,
    "arrow": arrow,
}
CLASSES = tuple(SHAPES)


def stroke(x: Field, y: Field, start: list[float], end: list[float], width: float) -> Field:
    """A line with round ends, the clutter of scenes; coordinates and width in px."""
    along, up = end[0] - start[0], end[1] - start[1]
    at = (((x - start[0]) * along + (y - start[1]) * up) / (along**2 + up**2 + 1e-6)).clip(0, 1)
    return np.hypot(x - start[0] - at * along, y - start[1] - at * up) - width


def depth(level: Field) -> Field:
    """Distance to the outline in px, positive inside, to first order: the level over the length of its gradient.

    Args:
        level: (H, W) an implicit function, negative inside, sampled once per pixel.
    """
    slope_y, slope_x = np.gradient(level)
    return -level / np.maximum(np.hypot(slope_x, slope_y), 1e-3)
