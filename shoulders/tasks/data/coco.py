"""COCO's files: annotated objects, and masks as compressed run lengths."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.tasks.data.coco_checks import ObjectTable, check_objects
from shoulders.tasks.data.splits import first_names

Rle = dict[str, Any]  # {"size": [height, width], "counts": compressed run lengths}

MAX_COORDINATE_PX = 1e5  # larger images, and boxes and points further from their corner, are errors


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of an annotation file and its n objects.

    Args:
        file: name as the file has it.
        size: height and width in px.
        classes: (n,) int64 in [0, K).
        boxes: (n, 4) float64, left, top, right, bottom in px.
        areas: (n,) float64 in px, as annotated; else of the mask, else of the box.
        crowd: (n,) bool, a group of objects under one annotation: detecting it counts neither for nor against.
        masks: run lengths of each object; None if one of them has only a box.
    """

    file: str
    size: tuple[int, int]
    classes: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    masks: tuple[Rle, ...] | None = None


@dataclass(frozen=True)
class _Object:
    """One annotation.

    Args:
        box: left, top, width, height: annotated, else of the mask.
        area: annotated; nan where there is none.
    """

    id: Any
    category: Any
    label: int
    box: list[float]
    area: float
    crowd: bool
    mask: Rle | None


@dataclass(frozen=True)
class Annotations:
    """The K classes and the images of an annotation file, both in the order of the file."""

    classes: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]


def library() -> ModuleType:
    """The package faster_coco_eval, which reads masks and computes precision; imported when first needed.

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
        DataError: the file, the annotation and the reason, for the first that cannot be used; or the evidence that
            boxes or masks are written in another way, see `check_objects`.
        RecipeError: it holds masks, and the package that reads them is absent.
    """
    images, class_indices, classes, annotations = _read_content(path)
    objects: defaultdict[Any, list[_Object]] = defaultdict(list)  # by image id
    for number, annotation in enumerate(annotations):
        try:
            image = annotation["image_id"]
            if image not in images:
                raise ValueError(f"image {image} is not in the list of images")
            objects[image].append(_read_object(annotation, number, images[image][1], class_indices))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            has_id = isinstance(annotation, dict) and "id" in annotation
            which = f"annotation {annotation['id']}" if has_id else f"annotation number {number}, without an id"
            raise DataError(f"{path}: {which}: {_reason(error)}; correct it or leave it out") from None
    if empty := [item.id for of_image in objects.values() for item in of_image if min(item.box[2:]) <= 0]:
        warnings.warn(
            f"{path}: left out {len(empty)} objects of no width or height (annotations {first_names(empty)})",
            stacklevel=2,
        )
    kept = {image: [item for item in objects[image] if min(item.box[2:]) > 0] for image in images}
    _check_categories(path, classes, [item for of_image in kept.values() for item in of_image])
    check_objects(path, _table({images[image]: of_image for image, of_image in kept.items()}))
    return Annotations(classes, tuple(_annotated_image(*images[image], kept[image]) for image in images))


def _read_content(
    path: Path,
) -> tuple[dict[Any, tuple[str, tuple[int, int]]], dict[Any, int], tuple[str, ...], list[Any]]:
    """Images {id: (file name, size)}, class indices {category id: index}, class names, and annotations."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: (str(image["file_name"]), _size(image)) for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        classes = tuple(dict.fromkeys(names.values()))  # the first category of Roboflow may have the name of another
        annotations = list(content["annotations"])
        if len(images) < len(content["images"]) or len(names) < len(content["categories"]):
            raise ValueError("two images or two categories have the same id")
        counts = Counter(file for file, _ in images.values())
        if twice := [file for file, count in counts.items() if count > 1]:
            raise ValueError(f"{len(twice)} images are listed more than once ({first_names(twice)}): list each once")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise DataError(f"{path}: not a COCO annotation file: JSON that is nested too deeply") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not a COCO annotation file: {_reason(error)}") from None
    return images, {category: classes.index(name) for category, name in names.items()}, classes, annotations


def _check_categories(path: Path, classes: tuple[str, ...], objects: Sequence[_Object]) -> None:
    """Refuse two categories of one name if both have objects."""
    category_of: dict[int, Any] = {}
    for item in objects:
        if category_of.setdefault(item.label, item.category) != item.category:
            raise DataError(
                f"{path}: categories {category_of[item.label]} and {item.category} are both called "
                f"{classes[item.label]!r}; rename or merge them"
            )


def _table(objects: dict[tuple[str, tuple[int, int]], list[_Object]]) -> ObjectTable:
    """The objects of all images by the name and the size (h, w) of the image."""
    items = [item for of_image in objects.values() for item in of_image]
    images = [image for image, of_image in objects.items() for _ in of_image]
    masks = [item.mask for item in items if item.mask]
    masked = np.array([item.mask is not None for item in items], dtype=bool)
    mask_boxes, mask_areas = np.full((len(items), 4), np.nan), np.full(len(items), np.nan)
    if masks:
        mask_boxes[masked], mask_areas[masked] = library().mask.toBbox(masks), library().mask.area(masks)
    mask_boxes[:, 2:] += mask_boxes[:, :2]
    return ObjectTable(
        [item.id for item in items],
        [file for file, _ in images],
        np.array([item.label for item in items], dtype=np.int64),
        np.array([item.box for item in items], dtype=np.float64).reshape(-1, 4),
        np.array([(width, height) for _, (height, width) in images], dtype=np.float64).reshape(-1, 2),
        np.array([item.area for item in items], dtype=np.float64),
        mask_boxes,
        mask_areas,
    )


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _size(image: dict[str, Any]) -> tuple[int, int]:
    size = (int(image["height"]), int(image["width"]))
    if not 1 <= min(size) <= max(size) < MAX_COORDINATE_PX:
        raise ValueError(f"image {image['id']} is {size[0]} px high and {size[1]} px wide")
    return size


def _annotated_image(file: str, size: tuple[int, int], objects: list[_Object]) -> AnnotatedImage:
    masks = [item.mask for item in objects if item.mask]
    boxes = np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return AnnotatedImage(
        file,
        size,
        np.array([item.label for item in objects], dtype=np.int64),
        boxes,
        np.array(list(map(_area, objects)), dtype=np.float64),
        np.array([item.crowd for item in objects], dtype=bool),
        tuple(masks) if len(masks) == len(objects) else None,
    )


def _area(item: _Object) -> float:
    """In px: annotated, else of the mask, else of the box."""
    if not math.isnan(item.area):
        return item.area
    return item.box[2] * item.box[3] if item.mask is None else float(library().mask.area(item.mask))


def _read_object(
    annotation: dict[str, Any], number: int, size: tuple[int, int], class_indices: dict[Any, int]
) -> _Object:
    category = annotation["category_id"]
    if category not in class_indices:
        raise ValueError(f"category {category} is not in the list of categories")
    shape = annotation.get("segmentation")
    mask = _read_mask(shape, size) if shape else None
    box = annotation["bbox"] if mask is None or "bbox" in annotation else library().mask.toBbox(mask).tolist()
    if not (_is_numbers(box) and len(box) == 4 and min(box[2:]) >= 0 and max(map(abs, box)) < MAX_COORDINATE_PX):
        raise ValueError(f"box {box} is not left, top, width, height in px with neither width nor height below 0")
    area = annotation.get("area")
    if area is not None and not (_is_numbers([area]) and area >= 0):
        raise ValueError(f"area {area} is not a number of pixels")
    crowd = annotation.get("iscrowd") or 0
    if crowd not in (0, 1):  # the text "0" would be true
        raise ValueError(f"iscrowd {crowd!r} is neither 0 nor 1")
    return _Object(
        annotation.get("id", number),
        category,
        class_indices[category],
        box,
        math.nan if area is None else float(area),
        bool(crowd),
        mask,
    )


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
    runs = counts if isinstance(counts, list) else parse_run_lengths(counts)
    if any(type(run) is not int or run < 0 for run in runs):
        raise ValueError("a run length is not a number of pixels")
    if shape.get("size") != list(size) or sum(runs) != math.prod(size):
        raise ValueError(f"run lengths of {shape.get('size')} cover {sum(runs)} px, the image is {list(size)}")
    return mask.frPyObjects({"size": list(size), "counts": runs}, *size)


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _is_polygon(part: Any) -> bool:
    return _is_numbers(part) and len(part) >= 6 and len(part) % 2 == 0 and max(map(abs, part)) < MAX_COORDINATE_PX


def parse_run_lengths(counts: str) -> list[int]:
    """Run lengths of COCO's text: five bits per character, lowest first; each run minus the one before the last."""
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
