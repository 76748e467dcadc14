"""Find splits of images with index masks: the class of each pixel."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoulders.errors import DataError
from shoulders.images.folder import list_files
from shoulders.tasks.data.mask_checks import MaskContents, check_contents, warn_interpolated
from shoulders.tasks.data.mask_files import IGNORE_INDEX, open_mask
from shoulders.tasks.data.shared_images import warn_shared
from shoulders.tasks.data.splits import (
    AnnotatedSplit,
    AnnotatedSplits,
    assemble_splits,
    first_names,
    open_split_images,
    present_splits,
)

LAYOUT = "PATH/images/{train,val,test}/* and PATH/annotations/{train,val,test}/*.png (val or test may be absent)"


@dataclass(frozen=True)
class MaskFile:
    """A file with the class of each pixel, and its height and width in px."""

    path: Path
    size: tuple[int, int]


def find_masks(path: Path | str, column: str = "image", fit: bool = True) -> AnnotatedSplits[MaskFile]:
    """Images with index masks; classes are those of ``classes.json``, else all up to the highest index.

    Args:
        column: of the images in parquet files.
        fit: whether something is fitted; if not, the split to evaluate on is enough.

    Raises:
        RecipeError: nothing at ``path``, or not this layout.
        DataError: an image without a mask of its own, a mask or class list that cannot be used, or fewer than two
            classes.
    """
    path = Path(path)
    names = present_splits(path, lambda name: (path / "images" / name).exists(), LAYOUT, fit)
    listed = _read_classes(path / "classes.json")
    by_name: dict[str, AnnotatedSplit[MaskFile]] = {}
    contents: dict[str, MaskContents] = {}
    for name in names:
        by_name[name], contents[name] = _read_split(path, name, column)
    every = set().union(*(content.masks for content in contents.values()))
    highest = max((index for index in every if index < IGNORE_INDEX), default=-1)
    classes = tuple(map(str, range(highest + 1))) if listed is None else listed
    trained = contents[names[0]].masks.keys() & set(range(len(classes)))
    if fit and len(trained) < 2:
        raise DataError(
            f"{path}: the masks of train hold {len(trained)} of {len(classes)} classes; a probe needs at least two "
            f"(pixels of {IGNORE_INDEX} are ignored: where they are meant as a class, write its index)"
        )
    check_contents(path, classes, contents, listed is not None)
    warn_interpolated(path, names[0], [file.path for file in by_name[names[0]].annotations])
    if fit:
        warn_shared(path, by_name, {name: contents[name].digests for name in names})
    return assemble_splits(by_name, classes)


def _read_split(path: Path, name: str, column: str) -> tuple[AnnotatedSplit[MaskFile], MaskContents]:
    """A split, and what its masks hold."""
    images = open_split_images(path / "images" / name, column)
    folder = path / "annotations" / name
    masks = _list_masks(folder)
    files: list[MaskFile] = []
    contents, image_of = MaskContents(), dict[str, str]()
    for index in range(len(images)):
        image = images.name(index)
        key = str(Path(image).with_suffix(""))
        if key not in masks:
            raise DataError(f"{folder / key}.png: missing; the image {image} of {name} needs this mask")
        if (other := image_of.setdefault(key, image)) != image:
            raise DataError(f"{masks[key]}: is the mask of two images, {other} and {image}; rename one of them")
        mask = open_mask(masks[key])
        contents.add(mask)
        files.append(MaskFile(masks[key], (mask.indices.shape[0], mask.indices.shape[1])))
    if unused := sorted(masks.keys() - image_of.keys()):
        warnings.warn(
            f"{folder}: {len(unused)} of {len(masks)} masks belong to no image of {path / 'images' / name} "
            f"({first_names([masks[key].name for key in unused])})",
            stacklevel=3,
        )
    return AnnotatedSplit(images, np.arange(len(images)), files), contents


def _list_masks(folder: Path) -> dict[str, Path]:
    """The PNG files below a folder by their relative path without the extension, which may be in capitals.

    Raises:
        DataError: two masks with the same path but for the extension.
    """
    masks: dict[str, Path] = {}
    for name in map(os.fsdecode, list_files(folder).files if folder.is_dir() else []):
        stem, extension = os.path.splitext(name)
        if extension.lower() == ".png" and masks.setdefault(stem, folder / name) != folder / name:
            raise DataError(f"{folder / name}: {masks[stem].name} is the mask of the same image; remove one of them")
    return masks


def _read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in ``classes.json``; None where there is no such file."""
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read: {error}; give a list of names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: not a list of names; give one name for each index from 0")
    if len(names) > IGNORE_INDEX or len(set(names)) < len(names):
        raise DataError(f"{path}: {len(names)} names, {len(set(names))} different; at most {IGNORE_INDEX}, each once")
    return tuple(names)
