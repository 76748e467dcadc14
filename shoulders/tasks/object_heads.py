"""A teacher's head on labelled objects: average precision of the classes that head and data have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shoulders.features import Skipped
from shoulders.tasks.average_precision import Detections, Kind, average_precision, interval, match
from shoulders.tasks.class_match import ClassMatch, match_classes
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, decode, encode
from shoulders.tasks.data.splits import AnnotatedSplits
from shoulders.tasks.frame import Frame
from shoulders.tasks.task import HeadWithInput, Row, Size
from shoulders.tasks.teacher_head_eval import check_sizes, head_outputs, head_rows


def evaluate_object_head(
    task: str,
    interpret: Callable[[Any, Any, list[Size]], Iterator[Detections]],
    kinds: Mapping[str, Kind],
    head: HeadWithInput,
    splits: AnnotatedSplits[AnnotatedImage],
    batch: int,
    workers: int,
) -> list[Row]:
    """Average precision of a teacher's head on the test images, with intervals.

    Args:
        interpret: the image processor, the head's output and the images' sizes -> detections in each image.
        kinds: {prefix of metrics: whether they are of boxes or masks}.
    """
    started_at = time.perf_counter()
    shared = match_classes(head.classes, splits.classes, head.class_map)
    detections: list[Detections] = []
    skipped: list[Skipped] = []
    images: list[AnnotatedImage] = []
    test = splits.test
    for positions, frames, output in head_outputs(head, test.images, test.indices, batch, workers, skipped):
        check_sizes(test, positions, frames)
        images += [_common_objects(test.annotations[position], shared) for position in positions]
        in_inputs = interpret(head.processor, output, [frame.input_size for frame in frames])
        in_images = (detections_in_image(*pair) for pair in zip(in_inputs, frames, strict=True))
        detections += [_common_detections(one, shared) for one in in_images]
    annotations = Annotations(splits.classes, tuple(images))
    values: dict[str, float] = {}
    has_objects = any((~image.crowd).any() for image in images)
    for prefix, kind in kinds.items() if has_objects else ():
        matched = match(annotations, detections, kind)
        values |= {f"{prefix}{name}": value for name, value in average_precision(matched).items() if value == value}
        low, high = interval(matched)
        values |= {f"{prefix}AP_low": low, f"{prefix}AP_high": high}
    left_out = sum(int((~np.isin(image.classes, shared.common)).sum()) for image in test.annotations)
    settings = {"split": splits.how, **shared.settings(left_out, "objects")}
    return head_rows(task, values, len(detections), started_at, skipped, head, settings)


def _common_objects(image: AnnotatedImage, shared: ClassMatch) -> AnnotatedImage:
    """An image with its objects of the classes that head and data have in common."""
    kept = np.isin(image.classes, shared.common)
    masks = None if image.masks is None else tuple(image.masks[index] for index in np.flatnonzero(kept))
    return replace(
        image,
        classes=image.classes[kept],
        boxes=image.boxes[kept],
        areas=image.areas[kept],
        crowd=image.crowd[kept],
        masks=masks,
    )


def _common_detections(detections: Detections, shared: ClassMatch) -> Detections:
    """The detections of classes that head and data have in common, with the classes of the data."""
    classes = np.array(shared.indices, dtype=np.int64)[detections.classes]
    kept = classes >= 0
    masks = detections.masks and tuple(detections.masks[index] for index in np.flatnonzero(kept))
    return Detections(classes[kept], detections.scores[kept], detections.boxes[kept], masks)


def detections_in_image(detections: Detections, frame: Frame) -> Detections:
    """Detections in the input of a model as detections in the original."""
    masks = detections.masks
    if masks and not frame.is_whole:
        in_input = torch.from_numpy(decode(masks, frame.input_size))
        masks = encode(frame.maps_in_image(in_input, fill=0).numpy())
    return replace(detections, boxes=frame.boxes_in_image(detections.boxes), masks=masks)
