"""The world as ordinary files, in the formats that `shoulders evaluate` and everyone else reads."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shoulders.errors import RecipeError
from shoulders.storage.atomic import write_folder
from shoulders.tasks.data.coco import list_runs
from shoulders.world.scenes import SIZE, SMALLEST, Scene, draw
from shoulders.world.shapes import CLASSES
from shoulders.world.styles import STYLES

SPLITS = ("train", "val", "test", "unlabelled")
PARTS = ("instances", "semantic/images", "semantic/annotations")
COUNTS = {"train": 1000, "val": 200, "test": 500}


def seed_of(split: str, seed: int = 0) -> int:
    """The seed of a split's scenes, so that no two splits of any world share a scene."""
    return len(SPLITS) * seed + SPLITS.index(split)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of (H, W, 3) or (H, W) pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_world(
    folder: Path | str,
    styles: Sequence[str] = tuple(STYLES),
    counts: Mapping[str, int] = COUNTS,
    size: int = SIZE,
    seed: int = 0,
    on_scene: Callable[[], object] = lambda: None,
) -> list[Path]:
    """Write ``folder/STYLE`` with all labels for each style, each in one step: whole or not at all.

    A style holds ``classification`` (class folders), ``instances`` (COCO JSON, masks as run lengths) and
    ``semantic`` (index masks, 0 the background) over the same pictures, and ``world.json``, its settings.

    Args:
        styles: names in `STYLES`.
        counts: scenes of each split.
        size: side in px.
        on_scene: called after each scene.

    Returns:
        The folders written; those that hold this very world already are left as they are.

    Raises:
        RecipeError: an unknown style or split, no scenes, or a folder with something else in it.
        SpaceError: the disk is full.
    """
    folder = Path(folder)
    check_world(folder, styles, counts, size, seed)
    written = []
    for style in styles:
        settings = _settings(style, counts, size, seed)
        if not _is_there(folder / style, settings):
            folder.mkdir(parents=True, exist_ok=True)
            write_folder(folder / style, lambda aside, settings=settings: _write_style(aside, settings, on_scene))  # type: ignore[misc]
            written.append(folder / style)
    return written


def check_world(folder: Path, styles: Sequence[str], counts: Mapping[str, int], size: int, seed: int) -> None:
    """Refuse what cannot be written, before anything is.

    Raises:
        RecipeError: see `write_world`.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise RecipeError(f"world styles: {', '.join(unknown) or 'none'}; choose from {', '.join(STYLES)}")
    if set(counts) - set(COUNTS) or counts.get("train", 0) < 1 or min(counts.values()) < 0:
        raise RecipeError(f"world counts: {dict(counts)}; give {', '.join(COUNTS)}, at least one scene to train")
    if size < SMALLEST or seed < 0:
        raise RecipeError(f"world of {size} px, seed {seed}: at least {SMALLEST} px and a seed of at least 0")
    for style in styles:
        _is_there(folder / style, _settings(style, counts, size, seed))


def _settings(style: str, counts: Mapping[str, int], size: int, seed: int) -> dict[str, Any]:
    return {"style": style, "seed": seed, "size": size, "counts": dict(counts)}


def _is_there(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` is this very world; False where there is nothing."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / "world.json").read_text())
    except (OSError, ValueError):
        raise RecipeError(f"{folder}: holds something else than a world; give another folder") from None
    if found != settings:
        raise RecipeError(f"{folder}: holds the world {found}, not {settings}; give another folder, or remove it")
    return True


def _write_style(folder: Path, settings: dict[str, Any], on_scene: Callable[[], object]) -> None:
    for split, count in settings["counts"].items():
        if count:
            _write_split(folder, split, count, settings, on_scene)
    (folder / "semantic" / "classes.json").write_text(json.dumps(["background", *CLASSES]) + "\n")
    (folder / "world.json").write_text(json.dumps(settings) + "\n")


def _write_split(
    folder: Path, split: str, count: int, settings: dict[str, Any], on_scene: Callable[[], object]
) -> None:
    of_class = [folder / "classification" / split / name for name in CLASSES]
    coco, pictures, indexed = (folder / f"{part}/{split}" for part in PARTS)
    for place in (*of_class, pictures, indexed, coco):
        place.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw(settings["style"], seed_of(split, settings["seed"]), index, settings["size"])
        name = f"{index:06d}.png"
        (coco / name).write_bytes(encode(scene.image))
        for twin in (of_class[scene.label], pictures):
            _link(coco / name, twin / name)
        (indexed / name).write_bytes(encode(scene.semantic))
        images.append({"id": index + 1, "file_name": name, "width": settings["size"], "height": settings["size"]})
        annotations += annotate(scene, index + 1, len(annotations) + 1)
        on_scene()
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances" / f"{split}.json").write_text(json.dumps(content))


def annotate(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """The objects of a scene as COCO annotations: boxes x, y, width, height in px; masks as run lengths."""
    rows = []
    for number, (kind, box, mask) in enumerate(zip(scene.classes, scene.boxes, scene.masks, strict=True)):
        left, top, right, bottom = box.tolist()
        rows.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": int(kind) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": list_runs(mask)},
            }
        )
    return rows


def _link(picture: Path, twin: Path) -> None:
    """The same picture under another name, at no cost where the disk can do that."""
    try:
        os.link(picture, twin)
    except OSError:
        shutil.copyfile(picture, twin)
