"""The world as files, in the common formats that `shoulders evaluate` reads."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shoulders.errors import RecipeError
from shoulders.images.run_lengths import mask_to_runs
from shoulders.storage.atomic import write_folder
from shoulders.storage.json_text import parse_json
from shoulders.world.scenes import MIN_SIZE, SIZE, Scene, draw
from shoulders.world.shapes import CLASSES
from shoulders.world.styles import STYLES

SPLITS = ("train", "val", "test", "unlabelled")
SCENES_PER_SPLIT = {"train": 1000, "val": 200, "test": 500}


def split_seed(split: str, seed: int = 0) -> int:
    """The seed of the scenes of a split; no two splits of any two worlds share a scene.

    Args:
        split: a name in `SPLITS`.
        seed: of the world.
    """
    return len(SPLITS) * seed + SPLITS.index(split)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 3) or (H, W) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_world(
    folder: Path | str,
    styles: Sequence[str] = tuple(STYLES),
    counts: Mapping[str, int] = SCENES_PER_SPLIT,
    size: int = SIZE,
    seed: int = 0,
    on_scene: Callable[[], object] = lambda: None,
) -> list[Path]:
    """Write the scenes of each style with all labels to ``folder/STYLE``.

    A style has ``classification`` (class folders), ``instances`` (COCO JSON with masks as run lengths) and
    ``semantic`` (index masks, where 0 is the background) of the same images, and ``world.json``, its settings. It is
    written to a temporary folder and renamed, so that an interrupted style leaves nothing behind.

    Args:
        styles: names in `STYLES`.
        counts: scenes of each split.
        size: side in px.
        on_scene: function that is called after each scene.

    Returns:
        The folders that were written. A style that exists with the same settings is left as it is.

    Raises:
        RecipeError: an unknown style or split, no scenes, or a folder with other content.
        SpaceError: the disk is full.
    """
    folder = Path(folder)
    check_world(folder, styles, counts, size, seed)
    written = []
    for style in styles:
        settings = _settings(style, counts, size, seed)
        if not _exists(folder / style, settings):
            folder.mkdir(parents=True, exist_ok=True)
            write_folder(folder / style, partial(_write_style, settings=settings, on_scene=on_scene))
            written.append(folder / style)
    return written


def check_world(folder: Path, styles: Sequence[str], counts: Mapping[str, int], size: int, seed: int) -> None:
    """Check the arguments of `write_world` and the folder, before anything is written.

    Raises:
        RecipeError: see `write_world`.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise RecipeError(f"world styles: {', '.join(unknown) or 'none'}; choose from {', '.join(STYLES)}")
    if set(counts) - set(SCENES_PER_SPLIT) or counts.get("train", 0) < 1 or min(counts.values()) < 0:
        raise RecipeError(
            f"world counts: {dict(counts)}; give {', '.join(SCENES_PER_SPLIT)}, at least one scene to train"
        )
    if size < MIN_SIZE or seed < 0:
        raise RecipeError(f"world of {size} px, seed {seed}: at least {MIN_SIZE} px and a seed of at least 0")
    for style in styles:
        _exists(folder / style, _settings(style, counts, size, seed))


def _settings(style: str, counts: Mapping[str, int], size: int, seed: int) -> dict[str, Any]:
    return {"style": style, "seed": seed, "size": size, "counts": dict(counts)}


def _exists(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a world of these settings; an error where it holds anything else."""
    if not folder.exists():
        return False
    try:
        existing = parse_json((folder / "world.json").read_text())
    except (OSError, ValueError):
        raise RecipeError(f"{folder}: is not a world; give another folder") from None
    if existing != settings:
        raise RecipeError(f"{folder}: is the world {existing}, not {settings}; give another folder, or remove it")
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
    class_folders = [folder / "classification" / split / name for name in CLASSES]
    coco, semantic = folder / "instances" / split, folder / "semantic" / "images" / split
    masks = folder / "semantic" / "annotations" / split
    for path in (*class_folders, coco, semantic, masks):
        path.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw(settings["style"], split_seed(split, settings["seed"]), index, settings["size"])
        name = f"{index:06d}.png"
        (coco / name).write_bytes(encode_png(scene.image))
        for other in (class_folders[scene.label], semantic):
            _link(coco / name, other / name)
        (masks / name).write_bytes(encode_png(scene.semantic))
        images.append({"id": index + 1, "file_name": name, "width": settings["size"], "height": settings["size"]})
        annotations += annotate(scene, index + 1, len(annotations) + 1)
        on_scene()
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances" / f"{split}.json").write_text(json.dumps(content))


def annotate(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """The objects of a scene as COCO annotations: boxes x, y, width, height in px, and masks as run lengths."""
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
                "segmentation": {"size": list(mask.shape), "counts": mask_to_runs(mask)},
            }
        )
    return rows


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on disks without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
