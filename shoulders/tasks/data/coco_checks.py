"""Signs in a COCO file that its boxes, areas or masks are not what COCO means by them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError
from shoulders.tasks.data.splits import first_names

Boxes = NDArray[np.float64]  # (n, 4)

COCO_BOX = "left, top, width, height in px"
MAX_OUTSIDE_PX = 1.5  # that a box reaches out of its image by rounding
MIN_OBJECTS = 3  # fewer are no evidence for a refusal
MIN_OUTSIDE = 0.01  # fraction of boxes outside that makes another convention worth a look
MIN_FITTING = 0.95  # fraction of boxes that fit in the right convention
OUTSIDE_RATIO = 10  # times as many boxes fit badly in the wrong convention as in the right one
MIN_FAR = 0.05  # fraction of boxes that do not touch their image: labels for another size
MAX_FRACTION = 1.5  # numbers of boxes that are fractions of the image
MIN_REACH = 2 / 3  # of the width or height that some box reaches, in any set of..
MIN_REACH_OBJECTS, MIN_REACH_IMAGES = 20, 10  # ..so many
MIN_OVERLAP = 0.5  # intersection over union of a mask's box and the annotated box
MIN_OVERLAP_SWAPPED = 0.8  # median of it, in the convention that is named
MAX_SPECK_PX = 4  # area of a mask of which nothing is left
MAX_MASK_GAP_PX = 2.0  # between them, whatever their overlap
MIN_MISSING_WARNED, MIN_MISSING_REFUSED = 0.01, 0.5  # fraction of the masks that miss their boxes
MIN_WRONG_AREAS = 0.05  # fraction of the objects
AREA_SLACK_PX = 10.0  # areas of small objects differ by the way in which their edge is counted
MIN_AREA_OF_BOX, MIN_AREA_OF_MASK = 0.005, 0.25  # fraction that an area covers; the largest is 1 and 1 / 0.25


def _from_corners(boxes: Boxes) -> Boxes:
    return boxes


def _from_edge(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _from_centre(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


# name and function (n, 4) -> left, top, right, bottom (n, 4); COCO's own comes first
ORDERS: dict[str, Callable[[Boxes], Boxes]] = {
    "left, top, width, height": _from_edge,
    "left, top, right, bottom": _from_corners,
    "centre x, centre y, width, height": _from_centre,
    "top, left, height, width": lambda boxes: _from_edge(boxes)[:, [1, 0, 3, 2]],
    "top, left, bottom, right": lambda boxes: boxes[:, [1, 0, 3, 2]],
}
UNITS = {"px": None, "fractions of the image": 1.0, "percent of the image": 100.0}


@dataclass(frozen=True)
class ObjectTable:
    """The n objects of a COCO file as they are annotated.

    Args:
        ids: of the annotations.
        images: the image of each.
        classes: (n,) class indices.
        boxes: (n, 4) as in the file.
        sizes: (n, 2) width and height of the image in px.
        areas: (n,) as in the file; nan where there is none.
        mask_boxes: (n, 4) left, top, right, bottom of the mask in px; nan where there is no mask, or no box beside it.
        mask_areas: (n,) in px; nan where there is no mask.
    """

    ids: Sequence[object]
    images: Sequence[Hashable]
    classes: NDArray[np.int64]
    boxes: Boxes
    sizes: NDArray[np.float64]
    areas: NDArray[np.float64]
    mask_boxes: Boxes
    mask_areas: NDArray[np.float64]

    def corners(self, order: str = "left, top, width, height", unit: str = "px") -> Boxes:
        """(n, 4) left, top, right, bottom in px, if the boxes are written in this way."""
        whole = UNITS[unit]
        corners = ORDERS[order](self.boxes)
        return corners if whole is None else corners * np.tile(self.sizes, 2) / whole

    def names(self, chosen: NDArray[np.bool_]) -> str:
        """The first ids of the chosen objects."""
        return "annotations " + first_names([self.ids[index] for index in np.flatnonzero(chosen).tolist()])


def check_objects(path: Path, table: ObjectTable) -> None:
    """Refuse a file whose boxes or masks are evidently written in another way, and name what looks odd.

    Raises:
        DataError: the file, the evidence and the likely convention.
    """
    if not table.ids:
        return
    _check_fractions(path, table)
    _check_convention(path, table)
    _check_areas_against_boxes(path, table)
    _check_masks(path, table)
    _check_outside(path, table)
    _warn_reach(path, table)
    _warn_areas(path, table)
    _warn_duplicates(path, table)


def _fits(corners: Boxes, sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) whether boxes have a width and a height and lie in their image."""
    ordered = corners[:, 2:] > corners[:, :2]  # (n, 2)
    inside = (corners[:, :2] >= -MAX_OUTSIDE_PX) & (corners[:, 2:] <= sizes + MAX_OUTSIDE_PX)  # (n, 2)
    return np.all(ordered & inside, axis=1)


def _refuse(path: Path, evidence: str, order: str, unit: str) -> None:
    raise DataError(
        f"{path}: {evidence}; the boxes seem to be {order} in {unit}: write {COCO_BOX}, as in COCO, and the areas in px"
    )


def _conventions(units: Sequence[str]) -> list[tuple[str, str]]:
    every = [(order, unit) for unit in units for order in ORDERS]
    return [convention for convention in every if convention != ("left, top, width, height", "px")]


def _check_fractions(path: Path, table: ObjectTable) -> None:
    if table.boxes.max() > MAX_FRACTION:
        return
    order, unit = max(
        _conventions(["fractions of the image"]), key=lambda how: _fits(table.corners(*how), table.sizes).sum()
    )
    _refuse(path, f"no number of any box is above {table.boxes.max():.4g}", order, unit)


def _check_convention(path: Path, table: ObjectTable) -> None:
    """Boxes that reach out of their images as COCO reads them, while (nearly) all fit in another convention."""
    outside = ~_fits(table.corners(), table.sizes)
    if outside.sum() < MIN_OBJECTS or outside.mean() < MIN_OUTSIDE:
        return
    conventions = _conventions(["px"])
    misfits = [(~_fits(table.corners(*how), table.sizes)).sum() for how in conventions]
    best = int(np.argmin(misfits))
    if misfits[best] <= min(outside.sum() / OUTSIDE_RATIO, (1 - MIN_FITTING) * len(outside)):
        evidence = f"{outside.sum()} of {len(outside)} boxes reach out of their images ({table.names(outside)})"
        _refuse(path, evidence, *conventions[best])


def _check_areas_against_boxes(path: Path, table: ObjectTable) -> None:
    """Areas that are width times height of the boxes in another convention, and not in COCO's."""
    if np.isnan(table.areas).any() or len(table.areas) < MIN_OBJECTS or _equals_areas(table, table.corners()) > 0.5:
        return
    for how in _conventions(list(UNITS)):
        corners = table.corners(*how)
        if min(_fits(corners, table.sizes).mean(), _equals_areas(table, corners)) >= MIN_FITTING:
            _refuse(path, "the areas are not those of boxes as COCO writes them", *how)


def _equals_areas(table: ObjectTable, corners: Boxes) -> float:
    """The fraction of objects whose area is that of these boxes."""
    areas = _box_areas(corners)
    return float((abs(table.areas - areas) <= 0.01 * areas + 1).mean())


def _box_areas(corners: Boxes) -> NDArray[np.float64]:
    return (corners[:, 2:] - corners[:, :2]).clip(0).prod(1)


def _overlap(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """(n,) intersection over union of pairs of boxes, with at least 1 px of union."""
    common = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
    return common / (_box_areas(a) + _box_areas(b) - common).clip(1)


def _check_masks(path: Path, table: ObjectTable) -> None:
    """Masks that lie elsewhere than their boxes: one of the two is not in px, or not in the order of COCO."""
    masked = ~np.isnan(table.mask_boxes).any(1)
    corners, mask_boxes = table.corners(), np.nan_to_num(table.mask_boxes)
    misses = masked & (_overlap(corners, mask_boxes) < MIN_OVERLAP)
    misses &= abs(corners - mask_boxes).max(1) > MAX_MASK_GAP_PX
    if misses.sum() < max(MIN_OBJECTS, MIN_MISSING_WARNED * masked.sum()):
        return
    evidence = f"the masks of {misses.sum()} of {masked.sum()} objects miss their boxes ({table.names(misses)})"
    if misses.sum() < MIN_MISSING_REFUSED * masked.sum():
        warnings.warn(f"{path}: {evidence}; correct the boxes or the masks", stacklevel=4)
        return
    if np.median(_overlap(corners, mask_boxes[:, [1, 0, 3, 2]])[masked]) > MIN_OVERLAP_SWAPPED:
        raise DataError(f"{path}: {evidence}; one of the two seems to have y before x: write x before y in both")
    for how in _conventions(list(UNITS)):
        if np.median(_overlap(table.corners(*how), mask_boxes)[masked]) > MIN_OVERLAP_SWAPPED:
            _refuse(path, evidence, *how)
    if np.median(table.mask_areas[masked]) <= MAX_SPECK_PX:
        raise DataError(f"{path}: {evidence}; the polygons seem to be fractions of the image: write px")
    raise DataError(
        f"{path}: {evidence}; polygons are x, y in px, and run lengths go down the columns, not along the rows"
    )


def _check_outside(path: Path, table: ObjectTable) -> None:
    """Boxes outside their images in no convention that is known; a few are only named."""
    corners = table.corners()
    far = np.any((corners[:, :2] >= table.sizes) | (corners[:, 2:] <= 0), axis=1)
    if far.sum() >= MIN_OBJECTS and far.mean() >= MIN_FAR:
        raise DataError(
            f"{path}: {far.sum()} of {len(far)} boxes do not touch their images ({table.names(far)}); they seem to be "
            f"for images of another size: write {COCO_BOX} of the images as they are"
        )
    outside = ~_fits(corners, table.sizes)
    if outside.any():
        warnings.warn(
            f"{path}: {outside.sum()} of {len(outside)} boxes reach out of their images by more than "
            f"{MAX_OUTSIDE_PX} px ({table.names(outside)}); boxes are {COCO_BOX}",
            stacklevel=4,
        )


def _warn_reach(path: Path, table: ObjectTable) -> None:
    """Boxes for smaller images, or in percent: they fill only the upper left of every image."""
    reach = (table.corners()[:, 2:] / table.sizes).max(0)  # of the width and of the height
    few = len(table.ids) < MIN_REACH_OBJECTS or len(set(table.images)) < MIN_REACH_IMAGES
    if few or reach.max() > MIN_REACH:
        return
    likely = "percent, or " if table.corners().max() <= 100 + MAX_OUTSIDE_PX else ""
    warnings.warn(
        f"{path}: no box reaches beyond {reach[0]:.0%} of the width and {reach[1]:.0%} of the height of its image; are "
        f"they {likely}for images of another size? boxes are {COCO_BOX}",
        stacklevel=4,
    )


def _warn_areas(path: Path, table: ObjectTable) -> None:
    """Areas that are neither those of the masks nor possible in the boxes; small, medium and large depend on them."""
    box_areas, has_mask = _box_areas(table.corners()), ~np.isnan(table.mask_areas)
    lowest = np.where(has_mask, MIN_AREA_OF_MASK * table.mask_areas, MIN_AREA_OF_BOX * box_areas)
    highest = np.where(has_mask, table.mask_areas / MIN_AREA_OF_MASK, box_areas)
    wrong = (table.areas < lowest - AREA_SLACK_PX) | (table.areas > 1.1 * highest + AREA_SLACK_PX)
    wrong |= (table.areas < 1) & (box_areas > 4 * AREA_SLACK_PX)
    if wrong.sum() >= max(MIN_OBJECTS, MIN_WRONG_AREAS * len(wrong)):
        warnings.warn(
            f"{path}: the areas of {wrong.sum()} of {len(wrong)} objects are not those of their masks or boxes in px "
            f"({table.names(wrong)}); AP_small, AP_medium and AP_large depend on them: correct them or leave them out",
            stacklevel=4,
        )


def _warn_duplicates(path: Path, table: ObjectTable) -> None:
    keys = list(zip(table.images, table.classes.tolist(), map(tuple, table.boxes.tolist()), strict=True))
    counts, first = Counter(keys), dict[Hashable, int]()
    again = np.array([first.setdefault(key, index) != index for index, key in enumerate(keys)])
    if len(counts) < len(keys):
        warnings.warn(
            f"{path}: {again.sum()} of {len(keys)} objects have the image, class and box of an earlier one "
            f"({table.names(again)}); at most one of each can be detected: leave the others out",
            stacklevel=4,
        )
