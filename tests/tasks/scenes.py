"""Images of coloured boxes with masks and objects, in the layouts that users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from shoulders.features import Batch, Features

SIZE = (32, 32)  # (h, w) in px of the input of the features below
COLOURS = ((230, 40, 40), (40, 40, 230))  # of class 0 and 1
COUNTS = {"train": 24, "val": 8, "test": 8}


def colours(batch: Batch) -> Features:
    """The mean colour of cells of 4 x 4 px: grid (8, 8)."""
    return Features.from_map(F.avg_pool2d(batch.pixels(SIZE), 4) * 4 - 2)


def constant(batch: Batch) -> Features:
    """Features without information: the same everywhere."""
    return Features.from_map(F.avg_pool2d(batch.pixels(SIZE), 4)[:, :1] * 0 + 1)


def scene(index: int, split: str) -> tuple[NDArray[np.uint8], list[tuple[int, int, int, int, int]]]:
    """Pixels (h, w, 3) and one or two boxes (class, left, top, right, bottom) that do not touch."""
    rng = np.random.default_rng((index, len(split)))
    h, w = ((48, 64), (40, 40))[index % 2]
    pixels = rng.integers(90, 130, (h, w, 3), dtype=np.uint8)
    boxes = []
    for side in range(1 + index % 3 % 2):
        width, height = (int(length) for length in rng.integers(10, 17, 2))
        left = side * w // 2 + int(rng.integers(0, w // 2 - width + 1))
        top = int(rng.integers(0, h - height + 1))
        label = int(rng.integers(2))
        pixels[top : top + height, left : left + width] = COLOURS[label]
        boxes.append((label, left, top, left + width, top + height))
    return pixels, boxes


def save_masks(path: Path, counts: dict[str, int] = COUNTS, names: bool = True) -> Path:
    """Index masks: 0 is the background, 1 and 2 are the boxes, the first line is 255."""
    for split, count in counts.items():
        for folder in ("images", "annotations"):
            (path / folder / split).mkdir(parents=True)
        for index in range(count):
            pixels, boxes = scene(index, split)
            mask = np.zeros(pixels.shape[:2], dtype=np.uint8)
            for label, left, top, right, bottom in boxes:
                mask[top:bottom, left:right] = 1 + label
            mask[0] = 255
            Image.fromarray(pixels).save(path / f"images/{split}/{index}.png")
            Image.fromarray(mask).save(path / f"annotations/{split}/{index}.png")
    if names:
        (path / "classes.json").write_text(json.dumps(["ground", "red", "blue"]))
    return path


def save_objects(path: Path, counts: dict[str, int] = COUNTS) -> Path:
    """COCO files with boxes and polygons."""
    for split, count in counts.items():
        (path / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            pixels, boxes = scene(index, split)
            Image.fromarray(pixels).save(path / split / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png", "height": len(pixels), "width": len(pixels[0])})
            for label, left, top, right, bottom in boxes:
                polygon = [left, top, right, top, right, bottom, left, bottom]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label + 1,
                        "iscrowd": 0,
                        "bbox": [left, top, right - left, bottom - top],
                        "segmentation": [polygon],
                        "area": (right - left) * (bottom - top),
                    }
                )
        categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (path / f"{split}.json").write_text(json.dumps(content))
    return path
