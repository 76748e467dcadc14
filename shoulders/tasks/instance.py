"""Instance segmentation: masks of objects, by a small dense probe, by Mask2Former, or by a teacher's head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoulders.tasks.average_precision import Detections
from shoulders.tasks.data.coco import AnnotatedImage, decode, encode
from shoulders.tasks.data.objects import find_objects
from shoulders.tasks.data.splits import AnnotatedSplit
from shoulders.tasks.heads.transformers import Mask2Former, transformers_loss
from shoulders.tasks.object_heads import evaluate_object_head
from shoulders.tasks.objects import (
    ObjectTask,
    dense_probe,
    detect_with_processor,
    object_scores,
    predict_objects,
)
from shoulders.tasks.probe import LARGER_PROBE_SETTINGS, fit_probe
from shoulders.tasks.task import Metric, ProbeHead, Size, Task


def masks_of_output(processor: Any, output: Any, sizes: list[Size]) -> Iterator[Detections]:
    """The masks in each image of a transformers segmenter's output, and the boxes around them, by its own classes."""
    for index, size in enumerate(sizes):
        # one image at a time: the processor upsamples all masks of a batch together
        single = SimpleNamespace(
            **{name: part[index : index + 1] for name, part in output.items() if torch.is_tensor(part)}
        )
        image = processor.post_process_instance_segmentation(
            single, threshold=0.0, target_sizes=[size], return_binary_maps=True
        )[0]
        segments = image["segments_info"]
        masks = image["segmentation"].detach().cpu().numpy() > 0.5 if segments else np.zeros((0, *size), dtype=bool)
        classes = np.array([segment["label_id"] for segment in segments], dtype=np.int64)
        scores = np.array([segment["score"] for segment in segments], dtype=np.float64)
        yield Detections(classes, scores, boxes_around(masks), encode(masks) if segments else ())


def boxes_around(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Left, top, right, bottom (n, 4) around masks (n, H, W), right and bottom exclusive."""
    sides = [(line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)) for line in (np.any(masks, 1), np.any(masks, 2))]
    (left, right), (top, bottom) = sides
    return np.stack([left, top, right, bottom], 1).astype(np.float64)


def object_mask_labels(
    split: AnnotatedSplit[AnnotatedImage], position: int, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """The masks of the objects of an image in the form of predictions."""
    image = split.annotations[position]
    masks = torch.from_numpy(decode(image.masks or (), image.size))
    return [
        {"label": classes[index], "score": 1.0, "mask": mask}
        for index, mask in zip(image.classes.tolist(), masks, strict=True)
    ]


PROBE = dense_probe("instance", "mask_AP", masks=True)
MASK2FORMER = replace(
    PROBE,
    name="mask2former",
    build=Mask2Former,
    loss=transformers_loss,
    evaluate=lambda head, bank, classes: object_scores(
        detect_with_processor(head, bank, masks_of_output), bank.annotations, classes, masks=True
    ),
    settings=LARGER_PROBE_SETTINGS,
)

TASK = Task(
    name="instance",
    title="Instance segmentation",
    metrics=(
        Metric("mask_AP", "mask AP", "mask_AP", "mask_AP", ("mask_AP",)),
        Metric("box_AP", "box AP", "AP", "AP", ("box_AP", "AP")),
    ),
    find_splits=partial(find_objects, masks=True),
    needs_spatial=True,
    fit_probe=partial(fit_probe, PROBE),
    probe_head=ProbeHead("dense", PROBE.build, lambda head: head.width, predict_objects),
    finetune=partial(ObjectTask, probe=PROBE, masks=True),
    evaluate_head=partial(evaluate_object_head, "instance", masks_of_output, {"mask_": "masks", "": "boxes"}),
    head_classes=("ForUniversalSegmentation", "ForInstanceSegmentation"),
    labels_as_predictions=object_mask_labels,
    larger_probes={"mask2former": partial(fit_probe, MASK2FORMER)},
    probe_packages={"mask2former": "scipy"},  # its loss matches predictions and objects one to one with it
    folders=("instances",),
)
