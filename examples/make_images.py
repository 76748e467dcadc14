"""Make a folder of small unlabelled pictures: shapes on coloured gradients and textures.

python examples/make_images.py OUT --count 300 --size 96 --seed 0
"""

from __future__ import annotations

import argparse
import colorsys
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Corners on the unit circle: (how many, radius of every second one); a circle is a polygon of many corners.
SHAPES = {
    "circle": (48, 1.0),
    "triangle": (3, 1.0),
    "square": (4, 1.0),
    "hexagon": (6, 1.0),
    "star": (10, 0.45),
    "flower": (12, 0.75),
}


def colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def background(rng: np.random.Generator, size: int, hue: float) -> Image.Image:
    """A gradient between two related hues, with waves and grain."""
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]  # (size, size) each
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    waves = np.sin(2 * math.pi * rng.uniform(1, 9) * (y * math.cos(angle) - x * math.sin(angle)))
    mix = (along - along.min()) / np.ptp(along) + rng.uniform(0, 0.18) * waves
    start = np.array(colour(hue, rng.uniform(0.2, 0.6), rng.uniform(0.75, 1.0)))
    end = np.array(colour(hue + rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.8)))
    pixels = start + (end - start) * mix.clip(0, 1)[..., None]  # (size, size, 3)
    pixels += rng.normal(0, rng.uniform(0, 9), (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_shape(rng: np.random.Generator, picture: Image.Image, hue: float) -> None:
    """One shape with a soft shadow, anywhere in the picture, in a hue across from the background's."""
    size = picture.width
    corners, inner = SHAPES[str(rng.choice(list(SHAPES)))]
    radius, turn = rng.uniform(0.1, 0.26) * size, rng.uniform(0, 2 * math.pi)
    centre = rng.uniform(0.15, 0.85, 2) * size
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    radii = radius * np.where(np.arange(corners) % 2, inner, 1.0)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + centre  # (corners, 2)
    shadow = Image.new("L", picture.size)
    ImageDraw.Draw(shadow).polygon([(x, y + 0.04 * size) for x, y in points], fill=110)
    picture.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(size / 32)))
    fill = colour(hue + 0.5 + rng.uniform(-0.2, 0.2), rng.uniform(0.55, 0.95), rng.uniform(0.7, 1.0))
    ImageDraw.Draw(picture).polygon([(x, y) for x, y in points], fill=fill)


def make_image(rng: np.random.Generator, size: int) -> Image.Image:
    """One picture, drawn at twice its size and reduced, so that edges are smooth."""
    hue = rng.uniform()
    picture = background(rng, 2 * size, hue)
    for _ in range(rng.integers(1, 5)):
        draw_shape(rng, picture, hue)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--size", type=int, default=96, help="side of a picture in px")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for index in range(arguments.count):
        picture = make_image(np.random.default_rng((arguments.seed, index)), arguments.size)
        picture.save(arguments.out / f"{index:05d}.jpg", quality=92)
    print(f"{arguments.count} images of {arguments.size} px in {arguments.out}")


if __name__ == "__main__":
    main()
