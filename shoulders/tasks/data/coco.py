"""Objects in images, as COCO writes them: annotation files and masks as run lengths."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError

Rle = dict[str, Any]  # {"size": [height, width], "counts": compressed run lengths}
_Object = tuple[int, tuple[float, ...], float, bool, Rle | None]  # class, corners, area, crowd, mask

FARTHEST = 1e5  # px; what lies further from the corner of an image is no place in it


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of an annotation file and its n objects.

    Args:
        file: name as the file has it.
        size: height and width in px.
        classes: (n,) int64 in [0, K).
        boxes: (n, 4) float64, left, top, right, bottom in px.
        areas: (n,) float64 in px, as annotated; else of the mask, else of the box.
        crowd: (n,) bool, a group that is not told apart: finding it counts neither for nor against.
        masks: run lengths of each object; None if one of them has a box alone.
    """

    file: str
    size: tuple[int, int]
    classes: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    masks: tuple[Rle, ...] | None = None


@dataclass(frozen=True)
class Annotations:
    """The K classes and the images of an annotation file, both in the order of the file."""

    classes: tuple[str, ...]
    pictures: tuple[AnnotatedImage, ...]


def library() -> ModuleType:
    """The package that reads masks and counts, imported when first needed.

    Raises:
        RecipeError: it is absent.
    """
    try:
        import faster_coco_eval
    except ImportError:
        raise RecipeError("objects in images need faster-coco-eval: pip install 'shoulders[det]'") from None
    return faster_coco_eval


def encode(masks: NDArray[np.bool_]) -> tuple[Rle, ...]:
    """Run lengths of masks (n, H, W)."""
    return tuple(library().mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)))


def decode(masks: Sequence[Rle], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Masks (n, H, W) of run lengths; ``size`` is (H, W)."""
    if not masks:
        return np.zeros((0, *size), dtype=bool)
    return library().mask.decode(list(masks)).transpose(2, 0, 1).astype(bool)


def read_annotations(path: Path) -> Annotations:
    """Read a COCO file: boxes, polygons, run lengths as a list or compressed, groups (``iscrowd``).

    Objects whose box is 0 px wide or high are left out with a warning: COCO's own train2017 has some.

    Raises:
        DataError: the file, the annotation and the reason, for the first that cannot be used.
        RecipeError: it holds masks, and the package that reads them is absent.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: (str(image["file_name"]), _size(image)) for image in told["images"]}
        kinds = {kind["id"]: number for number, kind in enumerate(told["categories"])}
        classes = tuple(str(kind["name"]) for kind in told["categories"])
        annotations = list(told["annotations"])
        if len(images) < len(told["images"]) or len(kinds) < len(classes):
            raise ValueError("two images or two categories have the same id")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a COCO annotation file: {_reason(error)}") from None
    objects: defaultdict[Any, list[_Object]] = defaultdict(list)
    flat: list[Any] = []
    for number, annotation in enumerate(annotations):
        try:
            image = annotation["image_id"]
            if image not in images:
                raise ValueError(f"image {image} is not in the list of images")
            read = _read_object(annotation, images[image][1], kinds)
            left, top, right, bottom = read[1]
            if left < right and top < bottom:
                objects[image].append(read)
            else:
                flat.append(annotation.get("id", number))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            known = isinstance(annotation, dict) and "id" in annotation
            which = f"annotation {annotation['id']}" if known else f"annotation number {number}, without an id"
            raise DataError(f"{path}: {which}: {_reason(error)}; correct it or leave it out") from None
    if flat:
        warnings.warn(f"{path}: left out {len(flat)} objects of no width or height, {flat[0]} first", stacklevel=2)
    return Annotations(classes, tuple(_picture(*images[image], objects[image]) for image in images))


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _size(image: dict[str, Any]) -> tuple[int, int]:
    size = (int(image["height"]), int(image["width"]))
    if min(size) < 1:
        raise ValueError(f"image {image['id']} is {size[0]} px high and {size[1]} px wide")
    return size


def _picture(file: str, size: tuple[int, int], objects: list[_Object]) -> AnnotatedImage:
    masks = [mask for *_, mask in objects if mask]
    return AnnotatedImage(
        file,
        size,
        np.array([kind for kind, *_ in objects], dtype=np.int64),
        np.array([corners for _, corners, *_ in objects], dtype=np.float64).reshape(-1, 4),
        np.array([area for _, _, area, *_ in objects], dtype=np.float64),
        np.array([crowd for *_, crowd, _ in objects], dtype=bool),
        tuple(masks) if len(masks) == len(objects) else None,
    )


def _read_object(annotation: dict[str, Any], size: tuple[int, int], kinds: dict[Any, int]) -> _Object:
    if annotation["category_id"] not in kinds:
        raise ValueError(f"category {annotation['category_id']} is not in the list of categories")
    shape = annotation.get("segmentation")
    mask = _read_mask(shape, size) if shape else None
    if mask is None or "bbox" in annotation:
        box = annotation["bbox"]
    else:
        box = library().mask.toBbox(mask).tolist()
    if not (_is_numbers(box) and len(box) == 4 and min(box[2:]) >= 0):
        raise ValueError(f"box {box} is not left, top, width, height with neither width nor height below 0")
    area = annotation.get("area")
    if area is None:
        area = box[2] * box[3] if mask is None else int(library().mask.area(mask))
    if not (_is_numbers([area]) and area >= 0):
        raise ValueError(f"area {area} is not a number of pixels")
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    return kinds[annotation["category_id"]], corners, float(area), bool(annotation.get("iscrowd", 0)), mask


def _read_mask(shape: Any, size: tuple[int, int]) -> Rle:
    """Polygons, a list of run lengths or compressed ones as compressed run lengths of the image's size."""
    mask = library().mask
    if isinstance(shape, list):
        if not all(_is_polygon(part) for part in shape):
            raise ValueError("a polygon is not a list of x and y of three points or more")
        return mask.merge(mask.frPyObjects(shape, *size))
    if not isinstance(shape, dict) or not isinstance(shape.get("counts"), list | str):
        raise ValueError("the segmentation is neither polygons nor run lengths")
    counts = shape["counts"]
    runs = counts if isinstance(counts, list) else run_lengths(counts)
    if any(type(run) is not int or run < 0 for run in runs):
        raise ValueError("a run length is not a number of pixels")
    if shape.get("size") != list(size) or sum(runs) != math.prod(size):
        raise ValueError(f"run lengths of {shape.get('size')} cover {sum(runs)} px, the image is {list(size)}")
    return mask.frPyObjects({"size": list(size), "counts": runs}, *size)


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(at, int | float) and math.isfinite(at) for at in values)


def _is_polygon(part: Any) -> bool:
    return _is_numbers(part) and len(part) >= 6 and len(part) % 2 == 0 and max(map(abs, part)) < FARTHEST


def list_runs(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE of a mask (H, W): lengths of runs down the columns, the first one of zeros."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs: list[int] = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def run_lengths(counts: str) -> list[int]:
    """Run lengths out of COCO's text: five bits a character from the lowest, each run less the last but one."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"compressed run lengths hold the character {chr(character)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end in the middle of a number")
    return runs
