"""The loss of the dense head for objects: which anchor predicts which object, and its terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.tasks.heads.objects import CENTER_RADIUS, ObjectPredictions, anchor_centres, box_ious


@dataclass(frozen=True)
class ObjectTarget:
    """The objects of one image: classes (n,), boxes (n, 4) in anchors, crowd (n,), (n, 4 H, 4 W) bool or None."""

    classes: Tensor
    boxes: Tensor
    crowd: Tensor
    masks: Tensor | None

    def to(self, device: torch.device) -> ObjectTarget:
        """The same target on a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return ObjectTarget(self.classes.to(device), self.boxes.to(device), self.crowd.to(device), masks)


def object_losses(
    predictions: ObjectPredictions, targets: list[ObjectTarget], grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Terms ``score``, ``box`` and, with masks, ``mask``; ``grid`` is that of the anchors."""
    score, box, mask = [], [], []
    for image, target in enumerate(targets):
        single, groups = ~target.crowd, target.boxes[target.crowd]
        classes, boxes = target.classes[single], target.boxes[single]
        assigned = assign_anchors(boxes, grid)  # (A,)
        anchors = (assigned >= 0).nonzero()[:, 0]  # (m,) that predict an object
        target_boxes = boxes[assigned[anchors]]  # (m, 4)
        box.append(1 - box_ious(predictions.boxes[image, anchors], target_boxes, generalized=True))
        target_scores = torch.zeros_like(predictions.scores[image])  # (A, K)
        fit = box_ious(predictions.boxes[image, anchors].detach(), target_boxes)  # (m,)
        target_scores[anchors, classes[assigned[anchors]]] = fit
        loss = quality_focal_loss(predictions.scores[image], target_scores)  # (A, K)
        score.append(loss * ~(inside_boxes(groups, grid) & (assigned < 0))[:, None])
        if target.masks is not None and predictions.embeddings is not None and predictions.prototypes is not None:
            embeddings = predictions.embeddings[image, anchors]
            logits = torch.einsum("me,eyx->myx", embeddings, predictions.prototypes[image])
            mask.append(mask_loss(logits, target.masks[single][assigned[anchors]], target_boxes))  # (m,)
    num_assigned = max(1, sum(len(part) for part in box))
    terms = {"score": torch.stack(score).sum() / num_assigned, "box": torch.cat(box).sum() / num_assigned}
    return terms | ({"mask": torch.cat(mask).sum() / num_assigned} if mask else {})


def assign_anchors(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(A,) the index of the box (n, 4) that each anchor predicts, -1 for none.

    An anchor whose centre is inside a box and near its centre predicts it, the smallest where there are several.
    """
    centres = anchor_centres(grid, boxes.device)  # (A, 2)
    if not len(boxes):
        return torch.full((len(centres),), -1, device=boxes.device)
    inside = ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(2)  # (n, A)
    distance = (centres - (boxes[:, None, :2] + boxes[:, None, 2:]) / 2).abs().amax(2)  # (n, A)
    candidates = inside & (distance < CENTER_RADIUS)
    candidates[torch.arange(len(boxes)), distance.argmin(1)] = True  # an object smaller than an anchor has one, too
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)  # (n,)
    smallest, assigned = torch.where(candidates, areas[:, None], torch.inf).min(0)
    return torch.where(smallest < torch.inf, assigned, -1)


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with scores in [0, 1], weighted by the squared error (arXiv 2006.04388)."""
    weights = (logits.detach().sigmoid() - targets).square()
    return weights * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def inside_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(A,) anchors inside one of the boxes (g, 4); in those of groups, a detection is neither right nor wrong."""
    centres = anchor_centres(grid, boxes.device)
    return ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(2).any(0)


def mask_loss(logits: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
    """(m,) cross-entropy and Dice (arXiv 1606.04797) of (m, 4 H, 4 W) inside the boxes (m, 4), in anchors."""
    centres = anchor_centres((logits.shape[1], logits.shape[2]), logits.device) / 2  # mask pixels are half an anchor
    inside = ((centres > boxes[:, None, :2] - 0.5) & (centres < boxes[:, None, 2:] + 0.5)).all(2)  # (m, pixels)
    flat, targets = logits.flatten(1), masks.flatten(1).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(flat, targets, reduction="none") * inside
    probability = flat.sigmoid() * inside
    dice = 1 - (2 * (probability * targets).sum(1) + 1) / (probability.sum(1) + (targets * inside).sum(1) + 1)
    return entropy.sum(1) / inside.sum(1).clamp(min=1) + dice
