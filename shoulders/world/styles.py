"""The four styles: the appearance of backgrounds, objects and finished images.

A style paints on a canvas (H, W, 3) of floats in [0, 1]. An object is given by its *depth*: the distance to its outline
in px, positive inside, on a window of the canvas. Lengths are in px of a 96 px scene, multiplied by ``unit``.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from shoulders.world.shapes import Field

Canvas = NDArray[np.floating[Any]]  # (H, W, 3), 0 to 1
Paint = Callable[[Canvas, Field, Generator, float, float], None]


@dataclass(frozen=True)
class Style:
    """The appearance of one domain.

    Args:
        background: (side in px, generator, unit) -> a canvas without objects.
        paint: (window of the canvas, depth in it, generator, unit, direction of the light in radians); it paints one
            object in place.
        clutter: smallest and largest number of strokes without a label.
        noise: largest standard deviation of the noise of an image.
        blur: largest radius of the blur of an image, in px of a 96 px scene.
    """

    background: Callable[[int, Generator, float], Canvas]
    paint: Paint
    clutter: tuple[int, int]
    noise: float
    blur: float


def colour(rng: Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Canvas:
    """One random colour (3,) of any hue."""
    chosen = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(chosen, dtype=np.float32)


def cloud(side: int, cells: int, rng: Generator) -> Field:
    """Smooth noise (side, side) in [0, 1]: a few random values, interpolated."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def grain(shape: tuple[int, int], rng: Generator) -> Field:
    """Noise (H, W) in [-0.5, 0.5). It draws one number from ``rng`` at any size, so that later draws do not change."""
    return np.random.default_rng(rng.integers(2**63)).random(shape, dtype=np.float32) - np.float32(0.5)


def ramp(side: int, rng: Generator) -> Field:
    """A straight slope (side, side) from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 6.283)
    at = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    return at[None, :] * np.float32(np.cos(angle)) + at[:, None] * np.float32(np.sin(angle)) + np.float32(0.5)


def cover(depth: Field) -> Field:
    """The fraction of each pixel that is inside (H, W), for antialiased edges."""
    return (depth + 0.5).clip(0, 1)


def blend(canvas: Canvas, paint: Canvas, opacity: Field) -> None:
    """Paint ``paint``, (3,) or (H, W, 3), over the canvas with an opacity (H, W)."""
    canvas += opacity[..., None] * (paint - canvas)


def shadow(canvas: Canvas, depth: Field, light: float, far: float, soft: float, dark: float) -> None:
    """Darken the canvas on the side of an object away from the light."""
    right, down = round(-far * np.cos(light)), round(-far * np.sin(light))
    height, width = depth.shape
    moved = np.full_like(depth, -soft)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = depth[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    canvas *= 1 - dark * ((moved + soft) / (2 * soft)).clip(0, 1)[..., None]


def stripes(shape: tuple[int, int], rng: Generator, period: float, duty: float) -> Field:
    """Lines (H, W), 1 on a line and 0 between, in a random direction.

    Args:
        period: distance of the lines in px.
        duty: fraction of the period that a line covers.
    """
    angle, phase = rng.uniform(0, 3.1416), rng.random()
    y, x = np.ogrid[: shape[0], : shape[1]]
    across = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / np.float32(period) + np.float32(phase)
    width = np.float32(0.5 * duty)
    return (((width - np.abs(across % 1 - np.float32(0.5))) * np.float32(period)) + 0.5).clip(0, 1).astype(np.float32)


def studio_background(side: int, rng: Generator, unit: float) -> Canvas:
    """A lit backdrop: two muted colours and soft folds."""
    first, second = colour(rng, (0.1, 0.4), (0.45, 0.9)), colour(rng, (0.1, 0.4), (0.35, 0.8))
    mixture = (0.7 * ramp(side, rng) + 0.3 * cloud(side, 4, rng))[..., None]
    return first + mixture * (second - first)


def studio_paint(canvas: Canvas, depth: Field, rng: Generator, unit: float, light: float) -> None:
    """A round, glossy body with a soft shadow."""
    shadow(canvas, depth, light, 3 * unit, 4 * unit, 0.45)
    height = np.sqrt((depth / (5 * unit)).clip(0, 1) * (2 - (depth / (5 * unit)).clip(0, 1)))
    slope_y, slope_x = np.gradient(height * 5 * unit)
    facing = (-slope_x * np.cos(light) - slope_y * np.sin(light)) / np.sqrt(1 + slope_x**2 + slope_y**2)
    body = colour(rng, (0.35, 0.95), (0.4, 0.95)) * (0.85 + 0.5 * facing)[..., None]
    if rng.random() < 0.4:
        body *= (1 - 0.35 * stripes(depth.shape, rng, rng.uniform(4, 9) * unit, 0.5))[..., None]
    blend(canvas, body + (0.5 * facing.clip(0.35, 1) - 0.175)[..., None], cover(depth))


def neon_background(side: int, rng: Generator, unit: float) -> Canvas:
    """A dark night with haze."""
    haze = colour(rng, (0.5, 0.9), (0.1, 0.3))
    return 0.03 + haze * cloud(side, 5, rng)[..., None]


def neon_paint(canvas: Canvas, depth: Field, rng: Generator, unit: float, light: float) -> None:
    """A glowing outline with a dim inside."""
    tube = colour(rng, (0.5, 1.0), (0.8, 1.0))
    canvas *= 1 - 0.5 * cover(depth)[..., None]
    away = np.abs(depth)
    glow = (0.55 * np.exp(-away / np.float32(2.5 * unit)) + 0.12 * cover(depth)) * rng.uniform(0.6, 1.1)
    canvas += glow[..., None] * tube
    core = (1.1 * unit - away + 0.5).clip(0, 1) * rng.uniform(0.5, 1)
    blend(canvas, tube + 0.6 * (1 - tube), core)


def paper_background(side: int, rng: Generator, unit: float) -> Canvas:
    """A pastel sheet with grain, sometimes with ruled lines."""
    sheet = colour(rng, (0.05, 0.35), (0.75, 0.97))
    rough = 0.06 * grain((side, side), rng) + 0.08 * (cloud(side, 12, rng) - 0.5)
    canvas = sheet + rough[..., None]
    if rng.random() < 0.4:
        ruled = stripes((side, side), rng, rng.uniform(5, 14) * unit, 0.3)
        canvas += 0.5 * ruled[..., None] * (colour(rng, (0.1, 0.5), (0.6, 0.95)) - canvas)
    return canvas


def paper_paint(canvas: Canvas, depth: Field, rng: Generator, unit: float, light: float) -> None:
    """A flat paper cut-out, plain or patterned, with a sharp shadow."""
    shadow(canvas, depth, light, 2 * unit, 1.2 * unit, 0.3)
    sheet = colour(rng, (0.15, 0.6), (0.6, 0.98)) + np.zeros_like(canvas)
    if rng.random() < 0.5:
        printed = stripes(depth.shape, rng, rng.uniform(3, 8) * unit, rng.uniform(0.3, 0.6))
        blend(sheet, colour(rng, (0.1, 0.7), (0.5, 1.0)), printed)
    sheet += 0.08 * grain(depth.shape, rng)[..., None]
    blend(canvas, sheet, cover(depth))


def ink_background(side: int, rng: Generator, unit: float) -> Canvas:
    """Old paper with stains."""
    sheet = np.array((0.95, 0.92, 0.85), dtype=np.float32) * rng.uniform(0.85, 1.0)
    return (sheet - 0.18 * (cloud(side, 6, rng) ** 2)[..., None]).astype(np.float32)


def ink_paint(canvas: Canvas, depth: Field, rng: Generator, unit: float, light: float) -> None:
    """A pen drawing: an outline and hatching in one dark ink."""
    ink = np.array((0.1, 0.1, 0.16), dtype=np.float32) + np.float32(rng.uniform(0, 0.15))
    inside = cover(depth)
    canvas += inside[..., None] * 0.5 * (np.float32(0.95) - canvas)
    hatched = stripes(depth.shape, rng, rng.uniform(2.5, 5.5) * unit, rng.uniform(0.2, 0.45)) * inside
    if rng.random() < 0.3:
        hatched = np.maximum(hatched, stripes(depth.shape, rng, rng.uniform(3, 6) * unit, 0.3) * inside)
    outline = (rng.uniform(0.6, 1.2) * unit - np.abs(depth) + 0.5).clip(0, 1)
    blend(canvas, ink, np.maximum(0.75 * hatched, outline))


STYLES = {
    "studio": Style(studio_background, studio_paint, clutter=(2, 6), noise=0.04, blur=0.8),
    "neon": Style(neon_background, neon_paint, clutter=(2, 6), noise=0.03, blur=0.5),
    "paper": Style(paper_background, paper_paint, clutter=(3, 8), noise=0.03, blur=0.6),
    "ink": Style(ink_background, ink_paint, clutter=(3, 8), noise=0.04, blur=0.6),
}
