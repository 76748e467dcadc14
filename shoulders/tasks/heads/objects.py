"""A small dense head that detects objects: one box and one score per class at every anchor, and optionally masks.

Boxes as in FCOS (arXiv 1904.01355), scores that say how well the box fits (arXiv 2006.04388), masks as sums of
prototypes (YOLACT, arXiv 1904.02689). Anchors are the cells of twice the grid of the features, A of them, row-major;
lengths are in anchors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_PROTOTYPES = 24
CENTER_RADIUS = 1.5  # anchors; how far from the centre of an object an anchor may predict it
MAX_CANDIDATES = 300  # of an image, before non-maximum suppression
MAX_DETECTIONS = 100  # of an image
MIN_SCORE = 0.01
NMS_IOU = 0.6  # above which the box of the lower score is dropped, of two of a class


@dataclass(frozen=True)
class ObjectPredictions:
    """The output of the head for B images.

    Args:
        scores: (B, A, K) logits.
        boxes: (B, A, 4) left, top, right, bottom in anchors.
        embeddings: (B, A, E), or None without masks.
        prototypes: (B, E, 4 H, 4 W), or None.
    """

    scores: Tensor
    boxes: Tensor
    embeddings: Tensor | None = None
    prototypes: Tensor | None = None


class ObjectHead(nn.Module):
    """Features (B, C, H, W) to `ObjectPredictions` at 2 H x 2 W anchors.

    Args:
        width: C.
        n_classes: K.
        masks: whether to predict embeddings and prototypes.
        trunk_width: channels at the grid of the features.
        anchor_width: channels at the grid of the anchors.
    """

    def __init__(self, width: int, n_classes: int, masks: bool, trunk_width: int = 128, anchor_width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Conv2d(width, trunk_width, 1),
            *_block(nn.Conv2d(trunk_width, trunk_width, 3, padding=1), trunk_width),
            *_block(nn.ConvTranspose2d(trunk_width, anchor_width, 2, stride=2), anchor_width),
            *_block(nn.Conv2d(anchor_width, anchor_width, 3, padding=1), anchor_width),
        )
        self.scores = _prediction_layer(anchor_width, n_classes, bias=-4.0)  # most anchors are background
        self.sides = _prediction_layer(anchor_width, 4, bias=1.0)
        self.embeddings = nn.Conv2d(anchor_width, NUM_PROTOTYPES, 1) if masks else None
        self.prototypes = (
            nn.Sequential(
                *_block(nn.ConvTranspose2d(anchor_width, anchor_width // 2, 2, stride=2), anchor_width // 2),
                nn.Conv2d(anchor_width // 2, NUM_PROTOTYPES, 3, padding=1),
            )
            if masks
            else None
        )

    @property
    def width(self) -> int:
        """C of the features that it takes."""
        return len(self.trunk[0].get_parameter("weight"))

    def forward(self, maps: Tensor) -> ObjectPredictions:
        """Predictions of features (B, C, H, W)."""
        at_anchors = self.trunk(maps)  # (B, anchor width, 2 H, 2 W)
        scores = self.scores(at_anchors).flatten(2).transpose(1, 2)  # (B, A, K)
        sides = self.sides(at_anchors).flatten(2).transpose(1, 2).clamp(max=6).exp()  # (B, A, 4)
        centres = anchor_centres((at_anchors.shape[2], at_anchors.shape[3]), at_anchors.device)  # (A, 2)
        boxes = torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], 2)
        if self.embeddings is None or self.prototypes is None:
            return ObjectPredictions(scores, boxes)
        embeddings = self.embeddings(at_anchors).flatten(2).transpose(1, 2)  # (B, A, E)
        return ObjectPredictions(scores, boxes, embeddings, self.prototypes(at_anchors))


def _prediction_layer(width: int, outputs: int, bias: float) -> nn.Module:
    layer = nn.Conv2d(width, outputs, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.get_parameter("bias"), bias)
    return layer


def _block(layer: nn.Module, width: int) -> list[nn.Module]:
    return [layer, nn.GroupNorm(8, width), nn.ReLU()]


def anchor_centres(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(A, 2) x and y of the centre of each anchor; ``grid`` is that of the anchors."""
    y, x = torch.meshgrid(*(torch.arange(side, device=device) + 0.5 for side in grid), indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1)


def box_ious(one: Tensor, other: Tensor, generalized: bool = False) -> Tensor:
    """IoU of boxes (..., 4) that can be broadcast; or the generalized one, from -1 to 1 (arXiv 1902.09630)."""

    def area(boxes: Tensor) -> Tensor:
        return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)

    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    intersection = area(torch.cat([low, high], -1))
    union = (area(one) + area(other) - intersection).clamp(min=1e-9)
    if not generalized:
        return intersection / union
    low, high = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    hull = area(torch.cat([low, high], -1)).clamp(min=1e-9)
    return intersection / union - (hull - union) / hull


def nms(boxes: Tensor, scores: Tensor, classes: Tensor, max_iou: float = NMS_IOU) -> Tensor:
    """Indices to keep of (q, 4), (q,), (q,), the best first: none overlaps a better one of its class."""
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    overlapping = (box_ious(boxes[:, None], boxes) > max_iou) & (classes[:, None] == classes)  # (q, q)
    keep = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for index in range(len(order)):
        if keep[index]:
            keep[index + 1 :] &= ~overlapping[index, index + 1 :]
    return order[keep]


@dataclass(frozen=True)
class ImageObjects:
    """Objects of one image, the best first: classes, scores (q,), boxes (q, 4) in anchors, (q, 4 H, 4 W) logits."""

    classes: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor | None

    def take(self, chosen: Tensor) -> ImageObjects:
        """Some of them: (q,) bool."""
        masks = None if self.masks is None else self.masks[chosen]
        return ImageObjects(self.classes[chosen], self.scores[chosen], self.boxes[chosen], masks)


def select_objects(predictions: ObjectPredictions, image: int) -> ImageObjects:
    """The objects of one of the B images, after non-maximum suppression."""
    n_classes = predictions.scores.shape[2]
    scores, order = predictions.scores[image].sigmoid().flatten().sort(descending=True, stable=True)
    order = order[:MAX_CANDIDATES][scores[:MAX_CANDIDATES] > MIN_SCORE]
    scores, classes, anchors = scores[: len(order)], order % n_classes, order // n_classes
    boxes = predictions.boxes[image, anchors]
    kept = nms(boxes.cpu(), scores.cpu(), classes.cpu()).to(boxes.device)[:MAX_DETECTIONS]
    masks = None
    if predictions.embeddings is not None and predictions.prototypes is not None:
        embeddings = predictions.embeddings[image, anchors[kept]]
        masks = torch.einsum("qe,eyx->qyx", embeddings, predictions.prototypes[image])
    return ImageObjects(classes[kept], scores[kept], boxes[kept], masks)
