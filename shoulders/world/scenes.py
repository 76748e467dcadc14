"""Scenes with all labels, each a pure function of (style, seed, index)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from shoulders.errors import RecipeError
from shoulders.world.shapes import CLASSES, SHAPES, Field, depth, stroke
from shoulders.world.styles import STYLES, Canvas, Style

SIZE = 96  # px
MIN_SIZE = 32  # px
MARGIN_PX = 8  # around an object, in px of a 96 px scene: space for its glow and its shadow
MAX_PLACEMENTS = 12  # random positions that are tried for an object before it is left out


@dataclass(frozen=True)
class Scene:
    """An image with all its labels.

    Args:
        image: (H, W, 3) uint8.
        classes: (n,) int64 in [0, 10), in the order in which the objects are drawn, from back to front.
        masks: (n, H, W) bool, the visible pixels of each object; no two overlap.
    """

    image: NDArray[np.uint8]
    classes: NDArray[np.int64]
    masks: NDArray[np.bool_]

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """(n, 4) left, top, right, bottom in px, tight around the visible pixels, right and bottom exclusive."""
        spans = []
        for side in (np.any(self.masks, 1), np.any(self.masks, 2)):  # (n, W), (n, H)
            spans.append((side.argmax(1), side.shape[1] - side[:, ::-1].argmax(1)))
        (left, right), (top, bottom) = spans
        return np.stack([left, top, right, bottom], 1).astype(np.float32)

    @cached_property
    def semantic(self) -> NDArray[np.uint8]:
        """(H, W) 0 for the background, 1 + class elsewhere."""
        return np.tensordot(self.classes + 1, self.masks, 1).astype(np.uint8)

    @cached_property
    def label(self) -> int:
        """The class of the whole image: that of the object with most visible pixels."""
        return int(self.classes[self.masks.sum((1, 2)).argmax()])


@dataclass(frozen=True)
class PlacedObject:
    """An object of a scene: its class, its centre and its radius in px."""

    kind: int
    x: float
    y: float
    radius: float


def draw(style: str, seed: int, index: int, size: int = SIZE) -> Scene:
    """Draw the scene number ``index`` of a style.

    Args:
        style: a name in `STYLES`.
        seed: of the random numbers, at least 0.
        index: 0, 1, 2, ...
        size: side in px, at least 32. A scene has the same objects at every size; each size is drawn anew, not resized.

    Raises:
        RecipeError: no such style, a negative seed or index, or a size below 32.
    """
    if style not in STYLES:
        raise RecipeError(f"world style {style!r}: not one of {', '.join(STYLES)}")
    if min(seed, index) < 0 or size < MIN_SIZE:
        raise RecipeError(f"world scene of seed {seed}, index {index}, {size} px: at least 0, 0 and {MIN_SIZE} px")
    rng = np.random.default_rng((seed, index, list(STYLES).index(style)))
    appearance, unit = STYLES[style], size / SIZE
    objects = place_objects(rng, size)
    light = rng.uniform(0, 6.283)
    canvas = appearance.background(size, rng, unit)
    for _ in range(rng.integers(*appearance.clutter, endpoint=True)):
        draw_clutter(canvas, appearance, rng, unit, light)
    owner = np.full((size, size), -1, dtype=np.int64)
    for number, placed in enumerate(objects):
        window, inside = outline(placed, rng, size, unit)
        appearance.paint(canvas[window], inside, rng, unit, light)
        owner[window][inside > 0] = number
    visible = np.unique(owner[owner >= 0])
    masks = owner[None] == visible[:, None, None]
    classes = np.array([objects[number].kind for number in visible], dtype=np.int64)
    return Scene(apply_camera(canvas, appearance, rng, unit), classes, masks)


def place_objects(rng: Generator, size: int) -> list[PlacedObject]:
    """Place one large object and up to five small ones, from back to front, with little overlap."""
    radii = [rng.uniform(0.2, 0.26) * size] + [rng.uniform(0.095, 0.14) * size for _ in range(rng.integers(1, 6))]
    objects: list[PlacedObject] = []
    for radius in radii:
        for _ in range(MAX_PLACEMENTS):
            x, y = rng.uniform(0.85 * radius, size - 0.85 * radius, 2)
            if all(np.hypot(x - other.x, y - other.y) > 0.8 * (radius + other.radius) for other in objects):
                objects.append(PlacedObject(int(rng.integers(len(CLASSES))), x, y, radius))
                break
    return [objects[number] for number in rng.permutation(len(objects))]


def outline(placed: PlacedObject, rng: Generator, size: int, unit: float) -> tuple[tuple[slice, slice], Field]:
    """The window of the canvas that an object can touch, and the object's depth in it (see `shoulders.world.styles`).

    The object is rotated, stretched and bent at random.
    """
    reach = 1.2 * placed.radius + MARGIN_PX * unit
    window = (window_around(placed.y, reach, size), window_around(placed.x, reach, size))
    y, x = (at.astype(np.float32) for at in np.ogrid[window])  # (h, 1), (1, w)
    angle, stretch = rng.uniform(0, 6.283), rng.uniform(0.75, 1.0)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    right, down = x - np.float32(placed.x), y - np.float32(placed.y)
    across, along = cos * right + sin * down, cos * down - sin * right
    bend = tuple(rng.random(3).tolist())
    shape = SHAPES[CLASSES[placed.kind]]
    level = shape(across / np.float32(placed.radius), along / np.float32(placed.radius * stretch), bend)
    return window, depth(level)


def window_around(centre: float, reach: float, size: int) -> slice:
    """The pixels within ``reach`` px of a centre, inside a canvas of ``size`` px."""
    return slice(max(0, int(centre - reach)), min(size, int(centre + reach) + 1))


def draw_clutter(canvas: Canvas, appearance: Style, rng: Generator, unit: float, light: float) -> None:
    """Draw a line or a dot, painted like an object but without a label."""
    size = len(canvas)
    start = rng.uniform(0, size, 2)
    length = rng.uniform(0, 0.3) * size if rng.random() < 0.7 else 0.0
    angle, width = rng.uniform(0, 6.283), rng.uniform(0.7, 2.2) * unit
    end = start + length * np.array([np.cos(angle), np.sin(angle)])
    centre, reach = (start + end) / 2, length / 2 + width + MARGIN_PX * unit
    window = (window_around(centre[1], reach, size), window_around(centre[0], reach, size))
    if any(span.stop - span.start < 2 for span in window):
        return
    y, x = (at.astype(np.float32) for at in np.ogrid[window])
    level = stroke(x, y, start.tolist(), end.tolist(), width)
    appearance.paint(canvas[window], -level, rng, unit, light)


def apply_camera(canvas: Canvas, appearance: Style, rng: Generator, unit: float) -> NDArray[np.uint8]:
    """The finished image (H, W, 3) of a canvas: uneven light, blur and noise, as of a camera."""
    at = np.linspace(-1, 1, len(canvas), dtype=np.float32)
    slope = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
    lit = canvas * (rng.uniform(0.9, 1.1) + slope[0] * at[None, :, None] + slope[1] * at[:, None, None])
    picture = Image.fromarray((lit.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, appearance.blur) * unit)))
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(255 * rng.uniform(0, appearance.noise))
    return (blurred + grain).clip(0, 255).astype(np.uint8)
