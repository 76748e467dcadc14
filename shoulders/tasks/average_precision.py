"""Average precision of detections over classes and thresholds (COCO, arXiv 1405.0312)."""

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
MAX_DETECTIONS = 100  # of an image and class


@dataclass(frozen=True)
class Detections:
    """Detections in one image: classes (q,), scores (q,), boxes (q, 4) as in `AnnotatedImage`, masks as run lengths."""

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    boxes: NDArray[np.float64]
    masks: tuple[Rle, ...] | None = None


@dataclass(frozen=True)
class Matches:
    """Detections matched with annotations, image by image, ready to be counted.

    Args:
        settings: thresholds, areas and ids, in a class of the package.
        cells: an object of the package for each class, area and image, images innermost.
    """

    settings: Any
    cells: list[Any]


def match(annotations: Annotations, detections: Sequence[Detections], kind: Kind = "boxes") -> Matches:
    """Match detections with annotations; of each image and class, the 100 of highest score count.

    Raises:
        RecipeError: not one `Detections` for each image, masks that one of them lacks, or the package is absent.
        NumericError: a score or a box that is not finite.
    """
    if len(detections) != len(annotations.images):
        raise RecipeError(f"average precision: detections of {len(detections)} for {len(annotations.images)} images")
    annotated: list[dict[str, Any]] = []
    detected: list[dict[str, Any]] = []
    for index, (image, of_image) in enumerate(zip(annotations.images, detections, strict=True)):
        if not (np.isfinite(of_image.scores).all() and np.isfinite(of_image.boxes).all()):
            raise NumericError(f"{image.file}: a detected score or box is not finite: check the weights")
        objects = zip(_entries(index, image, kind), image.areas.tolist(), image.crowd.tolist(), strict=True)
        annotated += [{**entry, "area": area, "iscrowd": int(crowd)} for entry, area, crowd in objects]
        scored = zip(_entries(index, of_image, kind), of_image.scores.tolist(), strict=True)
        detected += [{**entry, "score": score} for entry, score in scored]
    truth = library().COCO(
        {
            "images": [
                {"id": i, "height": image.size[0], "width": image.size[1]} for i, image in enumerate(annotations.images)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(annotations.classes)],
            "annotations": [{"id": i, **entry} for i, entry in enumerate(annotated, start=1)],
        }
    )
    shape = {"boxes": "bbox", "masks": "segm"}[kind]
    evaluator = library().COCOeval_faster(truth, truth.loadRes(detected), shape, separate_eval=True)
    evaluator.params.maxDets = [MAX_DETECTIONS]
    evaluator.evaluate()
    return Matches(evaluator.params, evaluator._evalImgs_cpp)


def _entries(image: int, objects: AnnotatedImage | Detections, kind: Kind) -> list[dict[str, Any]]:
    """An entry of a COCO file for each object."""
    classes = objects.classes.tolist()
    if kind == "boxes":
        sides = np.concatenate([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], 1).tolist()
        return [{"image_id": image, "category_id": k, "bbox": box} for k, box in zip(classes, sides, strict=True)]
    if objects.masks is None:
        raise RecipeError(f"average precision of masks: image number {image} has only boxes")
    pairs = zip(classes, objects.masks, strict=True)
    return [{"image_id": image, "category_id": k, "segmentation": dict(mask)} for k, mask in pairs]


def average_precision(matches: Matches) -> dict[str, float]:
    """`METRICS`, each from 0 to 1, the mean over the classes that have objects; nan where there is no object."""
    precision = _precision(matches.settings, matches.cells)  # (T, R, K, A)
    all_areas = precision[..., 0]
    slices = (all_areas, all_areas[0], all_areas[5], precision[..., 1], precision[..., 2], precision[..., 3])
    return dict(zip(METRICS, map(_mean, slices), strict=True))


def interval(matches: Matches, draws: int = 200, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The interval of AP that holds `level` of `draws` samples of the images with replacement (Efron, 1979)."""
    settings = copy.copy(matches.settings)
    settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
    images = len(settings.imgIds)
    cells = np.array(matches.cells, dtype=object).reshape(-1, len(matches.settings.areaRng), images)[:, 0]  # (K, I)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = cells[:, generator.integers(images, size=images)]
        values.append(_mean(_precision(settings, drawn.ravel().tolist())))
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _precision(settings: Any, cells: list[Any]) -> NDArray[np.float64]:
    """(T, R, K, A) at IoU thresholds, recalls, classes and areas; -1 where there is no object."""
    accumulated = library().faster_eval_api_cpp.COCOevalAccumulate(settings, cells)
    return np.asarray(accumulated["precision"])[..., 0]


def _mean(precision: NDArray[np.float64]) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if len(defined) else math.nan
