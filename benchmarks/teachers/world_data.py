"""Scenes of the small world in memory: pixels, labels, maps and objects, drawn once and stored on disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch
from torch import Tensor

from shoulders.world import STYLES, draw

SIZE = 96
SPLITS = {"train": 0, "val": 1, "test": 2}  # the seed that each split is drawn with


@dataclass(frozen=True)
class Scenes:
    """B scenes of one style.

    Args:
        images: uint8 (B, 3, H, W).
        labels: int64 (B,), class of the object that covers most pixels.
        semantic: uint8 (B, H, W), 0 background, 1 + class.
        instances: uint8 (B, H, W), 0 background, i + 1 where object i is visible.
        counts: int64 (B,), objects of each scene.
        classes: int64 (sum of counts,), the classes of all objects, scene by scene.
        boxes: float32 (sum of counts, 4), their boxes x0 y0 x1 y1 in px.
    """

    images: Tensor
    labels: Tensor
    semantic: Tensor
    instances: Tensor
    counts: Tensor
    classes: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def each_classes(self) -> list[Tensor]:
        """The classes (n,) of each scene's objects."""
        return list(self.classes.split(self.counts.tolist()))

    def each_boxes(self) -> list[Tensor]:
        """The boxes (n, 4) of each scene's objects."""
        return list(self.boxes.split(self.counts.tolist()))

    def masks(self, index: int) -> Tensor:
        """The visible pixels of the objects of one scene, bool (n, H, W), disjoint."""
        return self.instances[index] == torch.arange(1, int(self.counts[index]) + 1)[:, None, None]


def load_scenes(style: str, split: str, count: int, work: Path) -> Scenes:
    """The first `count` scenes of a split, drawn (4 ms each) or read back from the folder `work`."""
    digest = hashlib.sha256(b"".join(draw(style, SPLITS[split], i, SIZE).image.tobytes() for i in range(8))).hexdigest()
    file = work / f"scenes-{style}-{split}-{count}-{digest[:8]}.pt"  # other scenes have another name
    if file.exists():
        return Scenes(**torch.load(file, weights_only=True))
    scenes = _draw_all(style, SPLITS[split], count)
    work.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(asdict(scenes), partial)
    os.replace(partial, file)
    return scenes


def load_styles(split: str, count: int, work: Path) -> dict[str, Scenes]:
    """The first `count` scenes of a split in every style."""
    return {style: load_scenes(style, split, count, work) for style in STYLES}


def _draw_all(style: str, seed: int, count: int) -> Scenes:
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    semantic = torch.empty(count, SIZE, SIZE, dtype=torch.uint8)
    instances = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    labels, counts, classes, boxes = [], [], [], []
    for index in range(count):
        scene = draw(style, seed, index, SIZE)
        images[index] = torch.from_numpy(scene.image).permute(2, 0, 1)
        semantic[index] = torch.from_numpy(scene.semantic)
        for number, mask in enumerate(torch.from_numpy(scene.masks), start=1):
            instances[index][mask] = number
        labels.append(scene.label)
        counts.append(len(scene.classes))
        classes.append(torch.from_numpy(scene.classes))
        boxes.append(torch.from_numpy(scene.boxes))
    return Scenes(
        images, torch.tensor(labels), semantic, instances, torch.tensor(counts), torch.cat(classes), torch.cat(boxes)
    )


def write_card(folder: Path, title: str, minutes: float, seed: int, entries: dict[str, str]) -> None:
    """The model card of a teacher of the small world."""
    command = f"python benchmarks/teachers/world.py --only {folder.name}"
    terms = "trained on images drawn by the project's own code"
    common.write_card(folder, title, minutes, seed, terms, entries, command)
