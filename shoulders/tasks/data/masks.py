"""Find splits of images with index masks: the class of each pixel."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shoulders.errors import DataError
from shoulders.tasks.data.splits import (
    AnnotatedSplit,
    AnnotatedSplits,
    assemble_splits,
    open_split_images,
    present_splits,
)

IGNORE_INDEX = 255
LAYOUT = "PATH/images/{train,val,test}/* and PATH/annotations/{train,val,test}/*.png (val or test may be absent)"
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # of Pillow: one number per pixel
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # greys of 2 and 4 bits, which Pillow spreads over 0 to 255


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
        DataError: an image without a mask, a mask or class list that cannot be used, or fewer than two classes.
    """
    path = Path(path)
    names = present_splits(path, lambda name: (path / "images" / name).exists(), LAYOUT, fit)
    listed = _read_classes(path / "classes.json")
    by_name: dict[str, AnnotatedSplit[MaskFile]] = {}
    indices: dict[str, set[int]] = {}  # that the masks of a split hold
    for name in names:
        by_name[name], indices[name] = _read_split(path, name, column)
    all_indices = set().union(*indices.values())
    classes = tuple(map(str, range(max(all_indices, default=-1) + 1))) if listed is None else listed
    trained = indices.get("train", set()) & set(range(len(classes)))
    if fit and len(trained) < 2:
        raise DataError(
            f"{path}: the masks of train hold {len(trained)} of {len(classes)} classes; a probe needs at least two "
            f"(pixels of {IGNORE_INDEX} are ignored: where they are meant as a class, write its index)"
        )
    if unnamed := sorted(all_indices - set(range(len(classes)))):
        warnings.warn(
            f"{path}: masks hold {', '.join(map(str, unnamed[:5]))}, classes.json names 0 to {len(classes) - 1}: such "
            "pixels are ignored; is its first name that of index 0?",
            stacklevel=2,
        )
    return assemble_splits(by_name, classes)


def _read_split(path: Path, name: str, column: str) -> tuple[AnnotatedSplit[MaskFile], set[int]]:
    """A split, and the indices that its masks hold."""
    images = open_split_images(path / "images" / name, column)
    files: list[MaskFile] = []
    indices: set[int] = set()
    for index in range(len(images)):
        file = (path / "annotations" / name / images.name(index)).with_suffix(".png")
        if not file.is_file():
            raise DataError(f"{file}: missing; the image {images.name(index)} of {name} needs this mask")
        mask = read_mask(file, IGNORE_INDEX)  # (H, W)
        indices.update(np.unique(mask[mask != IGNORE_INDEX]).tolist())
        files.append(MaskFile(file, (mask.shape[0], mask.shape[1])))
    return AnnotatedSplit(images, np.arange(len(images)), files), indices


def read_mask(path: Path, n_classes: int) -> NDArray[np.uint8]:
    """The class of each pixel (H, W); 255 where the index is none of the ``n_classes``.

    Raises:
        DataError: the file and the reason.
    """
    try:
        with Image.open(path) as image:  # its warnings are ignored, see `shoulders.images.decode`
            if image.mode not in _INDEX_MODES:
                raise ValueError(f"it holds colours ({image.mode}), not one index for each pixel")
            step = _GREY_STEPS.get(str(image.tile[0].args), 1) if image.tile else 1
            indices = np.asarray(image).astype(np.int64) // step
    except Exception as error:  # no list of what decoders raise is ever complete
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a mask that can be read: {reason}; correct it or leave it out") from error
    return np.where((indices >= 0) & (indices < n_classes), indices, IGNORE_INDEX).astype(np.uint8)


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
