"""What detection and instance segmentation share: the dense probe, its targets and predictions, COCO's scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features, FeaturesOf, Skipped
from shoulders.images import WHOLE_IMAGE, View
from shoulders.tasks.average_precision import Detections, average_precision, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, decode, encode
from shoulders.tasks.data.splits import AnnotatedSplit, AnnotatedSplits
from shoulders.tasks.feature_bank import FeatureBank, read_image, to_float16
from shoulders.tasks.heads.object_loss import ObjectTarget, object_losses
from shoulders.tasks.heads.objects import ImageObjects, ObjectHead, select_objects
from shoulders.tasks.probe import ProbeSettings, SpatialProbe
from shoulders.tasks.task import Size

MAX_MASK_PIXELS = 2**26  # of masks that are upsampled together
MIN_VISIBLE = 0.25  # fraction of a box inside a view, for its object to count
CORNERS = ("xmin", "ymin", "xmax", "ymax")
SETTINGS = ProbeSettings(
    lrs=(1e-3,),
    weight_decay=0.01,
    schedule="constant",
    warmup_steps=50,
    min_steps=600,
    max_grad_norm=10.0,
    ema=0.99,
    num_evals=4,
)


def dense_probe(task: str, metric: str, masks: bool) -> SpatialProbe:
    """The default probe of a task on objects."""
    return SpatialProbe(
        task=task,
        name="dense",
        metric=metric,
        build=lambda width, n_classes: ObjectHead(width, n_classes, masks),
        targets=lambda bank, n_classes: [object_target(image, bank.grid, masks) for image in bank.annotations],
        loss=dense_loss,
        evaluate=lambda head, bank, classes: object_scores(detect(head, bank), bank.annotations, classes, masks),
        settings=SETTINGS,
    )


def dense_loss(head: ObjectHead, maps: Tensor, targets: Sequence[ObjectTarget]) -> Tensor:
    """The sum of the terms of `object_losses` for features (B, C, H, W)."""
    on_device = [target.to(maps.device) for target in targets]
    terms = object_losses(head(maps), on_device, (2 * maps.shape[2], 2 * maps.shape[3]))
    return torch.stack(list(terms.values())).sum()


def object_target(image: AnnotatedImage, grid: tuple[int, int], masks: bool, view: View = WHOLE_IMAGE) -> ObjectTarget:
    """The objects of a view in anchors, masks at four times the grid of the features.

    Objects of which a view shows less than a quarter are left out; the sides of the view are whole px.
    """
    top, left = round(view.top * image.size[0]), round(view.left * image.size[1])
    h, w = round(view.height * image.size[0]), round(view.width * image.size[1])
    anchors_per_px = torch.tensor([2 * grid[1] / w, 2 * grid[0] / h]).repeat(2)  # (4,)
    boxes, kept = torch.from_numpy(image.boxes).float(), np.arange(len(image.boxes))
    if view != WHOLE_IMAGE:
        boxes, visible = crop_boxes(boxes - torch.tensor([left, top]).repeat(2), (h, w), view.flip)
        kept = (visible >= MIN_VISIBLE).nonzero()[:, 0].numpy()
    small = None
    if masks:
        encoded = tuple(image.masks[index] for index in kept) if image.masks else ()
        full = torch.from_numpy(decode(encoded, image.size))[:, top : top + h, left : left + w].float()  # (n, h, w)
        full = full.flip(2) if view.flip else full
        size = (4 * grid[0], 4 * grid[1])
        # an empty batch cannot be resized
        small = F.adaptive_avg_pool2d(full, size) >= 0.5 if len(full) else torch.zeros(0, *size, dtype=torch.bool)
    classes, crowd = torch.from_numpy(image.classes[kept]), torch.from_numpy(image.crowd[kept])
    return ObjectTarget(classes, boxes[torch.from_numpy(kept)] * anchors_per_px, crowd, small)


def crop_boxes(boxes: Tensor, size: Size, flip: bool) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) clipped to a view of ``size`` = (h, w) and mirrored, and the visible fraction (n,) of each."""
    limits = torch.tensor([size[1], size[0]]).repeat(2)
    inside = torch.minimum(boxes.clamp(min=0), limits)
    areas, full_areas = ((part[:, 2:] - part[:, :2]).prod(1) for part in (inside, boxes))
    if flip:
        inside = torch.stack([size[1] - inside[:, 2], inside[:, 1], size[1] - inside[:, 0], inside[:, 3]], 1)
    return inside, areas / full_areas


@torch.no_grad()
def detect(head: ObjectHead, bank: FeatureBank[AnnotatedImage]) -> list[Detections]:
    """The detections of the dense head in each image, in px of the original."""
    detections = []
    for indices, maps in bank.batches():
        predictions = head(maps)
        for position, index in enumerate(indices):
            objects = select_objects(predictions, position)
            detections.append(to_detections(objects, bank.annotations[index].size, bank.grid))
    return detections


@torch.no_grad()
def detect_with_processor(
    head: Any, bank: FeatureBank[AnnotatedImage], interpret: Callable[[Any, Any, list[Size]], Iterator[Detections]]
) -> list[Detections]:
    """The detections of a transformers head in each image, in px of the original.

    Args:
        interpret: `boxes_of_output` or `masks_of_output`.
    """
    detections: list[Detections] = []
    for indices, maps in bank.batches():
        detections += interpret(head.processor, head(maps), [bank.annotations[index].size for index in indices])
    return detections


def object_scores(
    detections: Sequence[Detections], images: Sequence[AnnotatedImage], classes: tuple[str, ...], masks: bool
) -> dict[str, float]:
    """AP by metric, those of masks with ``mask_`` in front; none where there is no object."""
    annotations = Annotations(classes, tuple(images))
    values = average_precision(match(annotations, detections, "boxes"))
    if masks:
        of_masks = average_precision(match(annotations, detections, "masks"))
        values |= {f"mask_{name}": value for name, value in of_masks.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def to_detections(
    objects: ImageObjects, size: Size, grid: tuple[int, int], max_pixels: int = MAX_MASK_PIXELS
) -> Detections:
    """Objects in anchors as `Detections` in an image of ``size`` = (h, w) px; ``grid`` is that of the features."""
    boxes, masks = boxes_in_pixels(objects, size, grid), objects.masks
    encoded: list[Any] = []
    if masks is not None:
        chunk = max(1, max_pixels // (size[0] * size[1]))
        for logits, inside in zip(masks.split(chunk), boxes.split(chunk), strict=True):
            encoded += encode(paste_masks(logits, inside, size).numpy())
    return Detections(
        objects.classes.cpu().numpy(),
        objects.scores.cpu().double().numpy(),
        boxes.double().numpy(),
        None if masks is None else tuple(encoded),
    )


def boxes_in_pixels(objects: ImageObjects, size: Size, grid: tuple[int, int]) -> Tensor:
    """Boxes (q, 4) of objects, clipped to an image of ``size`` = (h, w) px."""
    h, w = size
    px_per_anchor = torch.tensor([w / (2 * grid[1]), h / (2 * grid[0])]).repeat(2)
    boxes = objects.boxes.cpu() * px_per_anchor
    return torch.stack(
        [boxes[:, 0].clamp(0, w), boxes[:, 1].clamp(0, h), boxes[:, 2].clamp(0, w), boxes[:, 3].clamp(0, h)], 1
    )


def paste_masks(logits: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Masks (q, h, w) bool of logits (q, 4 H, 4 W), each inside its box (q, 4) in px of the original."""
    if not len(logits):
        return torch.zeros(0, *size, dtype=torch.bool)
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    left, top, right, bottom = (boxes[:, side, None, None] for side in range(4))
    inside = (x > left - 0.5) & (x < right + 0.5) & (y > top - 0.5) & (y < bottom + 0.5)  # (q, h, w)
    upsampled = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return (upsampled.cpu() > 0) & inside


def predict_objects(
    head: ObjectHead, classes: Sequence[str], features: Features, sizes: Sequence[Size], threshold: float
) -> list[Any]:
    """``[{label, score, box}]`` for each image, or with ``mask``, of the objects with at least ``threshold``."""
    predictions, per_image = head(to_float16(features.to_map().float()).float()), []
    for image, size in enumerate(sizes):
        objects = select_objects(predictions, image)
        objects = objects.take(objects.scores >= threshold)  # before masks are upsampled to the size of the image
        boxes = boxes_in_pixels(objects, size, features.grid)
        if objects.masks is None:
            shapes = [{"box": dict(zip(CORNERS, box, strict=True))} for box in boxes.tolist()]
        else:
            shapes = [{"mask": mask} for mask in paste_masks(objects.masks, boxes, size)]
        labels = zip(objects.classes.tolist(), objects.scores.tolist(), shapes, strict=True)
        per_image.append([{"label": classes[index], "score": score, **shape} for index, score, shape in labels])
    return per_image


@dataclass(frozen=True)
class ObjectTask:
    """Finetuning: the loss of the dense probe, with boxes or with masks."""

    splits: AnnotatedSplits[AnnotatedImage]
    probe: SpatialProbe
    masks: bool
    whole_images: bool = True

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.probe.task

    @property
    def metric(self) -> str:
        """AP of boxes, or of masks."""
        return self.probe.metric

    def build_head(self, width: int) -> nn.Module:
        """A fresh head of the default probe."""
        return self.probe.build(width, len(self.splits.classes))

    def read_image(
        self, split: AnnotatedSplit[AnnotatedImage], position: int, min_side: int
    ) -> tuple[Tensor, Size] | Skipped:
        """A decoded image and the size that it is annotated at."""
        image = read_image(split, position, min_side)
        return image if isinstance(image, Skipped) else (image, split.annotations[position].size)

    def target(
        self, split: AnnotatedSplit[AnnotatedImage], position: int, view: View, grid: tuple[int, int]
    ) -> ObjectTarget:
        """See `object_target`."""
        return object_target(split.annotations[position], grid, self.masks, view)

    def loss(self, head: nn.Module, features: Features, targets: Sequence[ObjectTarget]) -> Tensor:
        """The loss of the default probe."""
        return self.probe.loss(head, features.to_map(), targets)

    def evaluate(
        self,
        head: nn.Module,
        features_of: FeaturesOf,
        split: AnnotatedSplit[AnnotatedImage],
        size: Size,
        batch: int,
        workers: int,
    ) -> tuple[dict[str, float], int]:
        """The metrics of the default probe."""
        bank = FeatureBank(features_of, split, [size], batch, workers)
        return self.probe.evaluate(head, bank, self.splits.classes), len(bank)
