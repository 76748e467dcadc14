"""Draw a contact sheet of each style, and one scene with its labels, as docs/world-*.jpg.

python benchmarks/world/sheets.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shoulders.images.pictures import draw_prediction
from shoulders.world import CLASSES, STYLES, draw

DOCS = Path(__file__).resolve().parents[2] / "docs"
COLUMNS, ROWS, TILE, GAP = 8, 3, 128, 4  # of a sheet; the last two in px


def sheet(style: str) -> Image.Image:
    """The first scenes of a style side by side."""
    step = TILE + GAP
    canvas = Image.new("RGB", (COLUMNS * step - GAP, ROWS * step - GAP), "white")
    for number in range(COLUMNS * ROWS):
        scene = Image.fromarray(draw(style, 0, number, TILE).image)
        canvas.paste(scene, (number % COLUMNS * step, number // COLUMNS * step))
    return canvas


def labelled(style: str, number: int) -> Image.Image:
    """A scene, its boxes, its semantic mask and its instance masks, side by side."""
    scene = draw(style, 0, number, 240)
    image = Image.fromarray(scene.image)
    corners = ("xmin", "ymin", "xmax", "ymax")
    names = [CLASSES[kind] for kind in scene.classes]
    boxes = [
        {"label": n, "score": 1.0, "box": dict(zip(corners, b, strict=True))}
        for n, b in zip(names, scene.boxes.tolist(), strict=True)
    ]
    masks = [{"label": n, "score": None, "mask": torch.from_numpy(m)} for n, m in zip(names, scene.masks, strict=True)]
    instances = [{**one, "label": f"{one['label']} {at + 1}", "score": 1.0} for at, one in enumerate(masks)]
    panels = [image.resize((480, 480), Image.Resampling.BICUBIC)]
    panels += [draw_prediction(image, prediction) for prediction in (boxes, masks, instances)]
    height = max(panel.height for panel in panels)
    canvas = Image.new("RGB", (4 * 480 + 3 * 12, height), "white")
    for at, panel in enumerate(panels):
        canvas.paste(panel, (at * 492, 0))
    return canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.LANCZOS)


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for style in STYLES:
        sheet(style).save(DOCS / f"world-{style}.jpg", quality=88)
        print(style, np.round([(DOCS / f"world-{style}.jpg").stat().st_size / 1024], 0), "KiB")
    labelled("paper", 4).save(DOCS / "world-labels.jpg", quality=90)


if __name__ == "__main__":
    main()
