"""Object detection: boxes, by a small dense probe, by RT-DETR v2, or by a teacher's head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from shoulders.tasks.average_precision import Detections
from shoulders.tasks.data.coco import AnnotatedImage
from shoulders.tasks.data.objects import find_objects
from shoulders.tasks.data.splits import AnnotatedSplit
from shoulders.tasks.heads.transformers import RTDetr, transformers_loss
from shoulders.tasks.object_heads import evaluate_object_head
from shoulders.tasks.objects import (
    CORNERS,
    ObjectTask,
    dense_probe,
    detect_with_processor,
    object_scores,
    predict_objects,
)
from shoulders.tasks.probe import LARGER_PROBE_SETTINGS, fit_probe
from shoulders.tasks.task import Metric, ProbeHead, Size, Task


def boxes_of_output(processor: Any, output: Any, sizes: list[Size]) -> Iterator[Detections]:
    """The boxes in each image of a transformers detector's output, by the detector's own classes."""
    for image in processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes):
        scores, classes, boxes = (image[name].detach().cpu().numpy() for name in ("scores", "labels", "boxes"))
        yield Detections(classes, scores.astype(np.float64), boxes.astype(np.float64))


def box_labels(split: AnnotatedSplit[AnnotatedImage], position: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The boxes of an image in the form of predictions."""
    image = split.annotations[position]
    return [
        {"label": classes[index], "score": None, "box": dict(zip(CORNERS, box, strict=True))}
        for index, box in zip(image.classes.tolist(), image.boxes.tolist(), strict=True)
    ]


PROBE = dense_probe("detection", "AP", masks=False)
RT_DETR = replace(
    PROBE,
    name="rt_detr_v2",
    build=RTDetr,
    loss=transformers_loss,
    evaluate=lambda head, bank, classes: object_scores(
        detect_with_processor(head, bank, boxes_of_output), bank.annotations, classes, masks=False
    ),
    settings=LARGER_PROBE_SETTINGS,
)

TASK = Task(
    name="detection",
    title="Object detection",
    metrics=(Metric("box_AP", "box AP", "AP", "AP", ("box_AP", "AP")),),
    find_splits=find_objects,
    needs_spatial=True,
    fit_probe=partial(fit_probe, PROBE),
    probe_head=ProbeHead("dense", PROBE.build, lambda head: head.width, predict_objects),
    finetune=partial(ObjectTask, probe=PROBE, masks=False),
    evaluate_head=partial(evaluate_object_head, "detection", boxes_of_output, {"": "boxes"}),
    head_classes=("ForObjectDetection",),
    labels_as_predictions=box_labels,
    larger_probes={"rt_detr_v2": partial(fit_probe, RT_DETR)},
    probe_packages={"rt_detr_v2": "scipy"},  # its loss matches predictions and objects one to one with it
    folders=("detection",),
)
