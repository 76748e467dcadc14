"""How well objects were found: average precision over classes and thresholds (COCO, arXiv 1405.0312)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import NumericError, RecipeError
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, Rle, library

Kind = Literal["boxes", "masks"]

# At IoU .50:.95, .50 and .75; then of objects below 32^2 px, up to 96^2 px, and above.
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True)
class Detections:
    """What a model found in one image: classes (q,), scores (q,), boxes (q, 4) as in `AnnotatedImage`, run lengths."""

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    boxes: NDArray[np.float64]
    masks: tuple[Rle, ...] | None = None


@dataclass(frozen=True)
class Matched:
    """What was found and what is there, matched image by image and ready to be counted.

    Args:
        settings: thresholds, areas and ids, in a class of the package.
        cells: an object of the package for each class, area and image, images innermost.
    """

    settings: Any
    cells: list[Any]


def match(truth: Annotations, found: Sequence[Detections], kind: Kind = "boxes") -> Matched:
    """Match what was found with what is there; of each image and class the 100 of highest score count.

    Raises:
        RecipeError: not one `Detections` for each image, masks that one of them lacks, or the package is absent.
        NumericError: a score or a box that is not finite.
    """
    if len(found) != len(truth.pictures):
        raise RecipeError(f"average precision: {len(found)} answers for {len(truth.pictures)} images")
    objects: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for image, (picture, answer) in enumerate(zip(truth.pictures, found, strict=True)):
        if not (np.isfinite(answer.scores).all() and np.isfinite(answer.boxes).all()):
            raise NumericError(f"{picture.file}: a score or a box found there is not finite: check the weights")
        there = zip(_rows(image, picture, kind), picture.areas.tolist(), picture.crowd.tolist(), strict=True)
        objects += [{**row, "area": area, "iscrowd": int(crowd)} for row, area, crowd in there]
        seen = zip(_rows(image, answer, kind), answer.scores.tolist(), strict=True)
        answers += [{**row, "score": score} for row, score in seen]
    annotated = library().COCO(
        {
            "images": [{"id": i, "height": at.size[0], "width": at.size[1]} for i, at in enumerate(truth.pictures)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(truth.classes)],
            "annotations": [{"id": i, **row} for i, row in enumerate(objects, start=1)],
        }
    )
    how = {"boxes": "bbox", "masks": "segm"}[kind]
    evaluator = library().COCOeval_faster(annotated, annotated.loadRes(answers), how, separate_eval=True)
    evaluator.params.maxDets = [100]
    evaluator.evaluate()
    return Matched(evaluator.params, evaluator._evalImgs_cpp)


def _rows(image: int, objects: AnnotatedImage | Detections, kind: Kind) -> list[dict[str, Any]]:
    classes = objects.classes.tolist()
    if kind == "boxes":
        sides = np.concatenate([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], 1).tolist()
        return [{"image_id": image, "category_id": k, "bbox": box} for k, box in zip(classes, sides, strict=True)]
    if objects.masks is None:
        raise RecipeError(f"average precision of masks: image number {image} has boxes alone")
    pairs = zip(classes, objects.masks, strict=True)
    return [{"image_id": image, "category_id": k, "segmentation": dict(mask)} for k, mask in pairs]


def average_precision(matched: Matched) -> dict[str, float]:
    """`METRICS`, each from 0 to 1, the mean over the classes that have objects; nan where no object is."""
    counted = _precision(matched.settings, matched.cells)  # (T, R, K, A)
    every = counted[..., 0]
    parts = (every, every[0], every[5], counted[..., 1], counted[..., 2], counted[..., 3])
    return dict(zip(METRICS, map(_mean, parts), strict=True))


def interval(matched: Matched, draws: int = 200, seed: int = 0, share: float = 0.95) -> tuple[float, float]:
    """The interval of AP that holds `share` of `draws` samples of the images with replacement (Efron, 1979)."""
    settings = copy.copy(matched.settings)
    settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
    images = len(settings.imgIds)
    cells = np.array(matched.cells, dtype=object).reshape(-1, len(matched.settings.areaRng), images)[:, 0]  # (K, I)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = cells[:, generator.integers(images, size=images)]
        values.append(_mean(_precision(settings, drawn.ravel().tolist())))
    low, high = np.nanquantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _precision(settings: Any, cells: list[Any]) -> NDArray[np.float64]:
    """(T, R, K, A) at IoU thresholds, recalls, classes and areas; -1 where there is no object."""
    counted = library().faster_eval_api_cpp.COCOevalAccumulate(settings, cells)
    return np.asarray(counted["precision"])[..., 0]


def _mean(precision: NDArray[np.float64]) -> float:
    there = precision[precision > -1]
    return float(there.mean()) if len(there) else math.nan
