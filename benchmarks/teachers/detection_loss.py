"""The loss of a detector of the RT-DETR family, for all its layers at once.

Varifocal, L1 and GIoU losses as in the family: one query of each decoder layer is assigned to each object, and each
denoising query to the object that it was made from. In addition several anchors of the encoder are assigned to each
object (as in arXiv 2211.12860), so that the backbone can be trained from scratch in minutes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CLASS_WEIGHT, SIDE_WEIGHT, OVERLAP_WEIGHT = 1.0, 5.0, 2.0


def to_centre(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom -> centre, width, height."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def to_corners(boxes: Tensor) -> Tensor:
    """Centre, width, height -> left, top, right, bottom."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (arXiv 1902.09630) of boxes given by their corners, broadcast."""
    both = (torch.minimum(one, other)[..., 2:] - torch.maximum(one, other)[..., :2]).clamp(min=0).prod(-1)
    hull = (torch.maximum(one, other)[..., 2:] - torch.minimum(one, other)[..., :2]).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (one, other)]
    union, hull = (areas[0] + areas[1] - both).clamp(min=1e-7), hull.clamp(min=1e-7)
    return both / union, both / union - (hull - union) / hull


@torch.no_grad()
def assign_one(logits: Tensor, boxes: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
    """The object that each query is assigned to, or -1: the assignment of least cost with one query per object.

    logits (B, L, Q, K), boxes (B, L, Q, 4), classes (B, M), truth (B, M, 4) -> (B, L, Q)
    """
    score = logits.sigmoid()
    focal = 0.75 * score**2 * (1e-8 + 1 - score).log() - 0.25 * (1 - score) ** 2 * (1e-8 + score).log()
    index = classes.clamp(min=0)[:, None, None].expand(*score.shape[:3], -1)  # (B, L, Q, M)
    ours, target_boxes = boxes[..., None, :], truth[:, None, None]
    cost = 2 * focal.gather(-1, index) + 5 * (ours - target_boxes).abs().sum(-1)
    cost -= 2 * overlaps(to_corners(ours), to_corners(target_boxes))[1]
    table, counts = cost.numpy(), (classes >= 0).sum(1).tolist()
    chosen = torch.full(score.shape[:3], -1)
    for image, count in enumerate(counts):
        for layer in range(table.shape[1]):
            query, target = linear_sum_assignment(table[image, layer, :, :count])
            chosen.numpy()[image, layer, query] = target
    return chosen


@torch.no_grad()
def assign_many(logits: Tensor, boxes: Tensor, classes: Tensor, truth: Tensor, anchors: int) -> Tensor:
    """The object that each anchor is assigned to, or -1: the `anchors` that fit each object best (arXiv 2108.07755).

    logits (B, N, K), boxes (B, N, 4), classes (B, M), truth (B, M, 4) -> (B, N)
    """
    index = classes.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)  # (B, N, M)
    iou = overlaps(to_corners(boxes)[:, :, None], to_corners(truth)[:, None])[0]
    fit = (logits.sigmoid().gather(-1, index) + 1e-4).sqrt() * (iou + 1e-4) ** 3 * (classes >= 0)[:, None]
    best = fit.topk(anchors, dim=1)
    value, target = torch.zeros_like(fit).scatter_(1, best.indices, best.values).max(-1)
    return torch.where(value > 0, target, -1)


def set_loss(logits: Tensor, boxes: Tensor, assigned: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
    """Sum of varifocal, L1 and GIoU losses of predictions (B, X, .), assigned to objects (B, X) or to none (-1)."""
    image, anchor = (assigned >= 0).nonzero(as_tuple=True)
    target = assigned[image, anchor]
    ours, target_boxes = boxes[image, anchor], truth[image, target]
    iou, giou = overlaps(to_corners(ours), to_corners(target_boxes))
    target_scores = torch.zeros_like(logits)
    target_scores[image, anchor, classes[image, target]] = iou.detach()
    weight = target_scores + 0.75 * logits.detach().sigmoid() ** 2 * (target_scores == 0)
    class_loss = F.binary_cross_entropy_with_logits(logits, target_scores, weight, reduction="sum")
    return (
        CLASS_WEIGHT * class_loss + SIDE_WEIGHT * (ours - target_boxes).abs().sum() + OVERLAP_WEIGHT * (1 - giou).sum()
    )


def detection_loss(output: Any, classes: Tensor, truth: Tensor, anchors: int) -> Tensor:
    """Loss for each object: the decoder's layers, their denoising queries, and `anchors` of the encoder."""
    logits, boxes = output.intermediate_logits, output.intermediate_reference_points  # (B, L, Q, .)
    noise = output.denoising_meta_values
    (noisy, logits), (noisy_boxes, boxes) = (part.split(noise["dn_num_split"], 2) for part in (logits, boxes))
    most = noisy.shape[2] // (2 * noise["dn_num_group"])  # each group: boxes near the objects, then boxes far from them
    near = torch.where(classes[:, :most] >= 0, torch.arange(most), -1)
    groups = torch.cat([near, torch.full_like(near, -1)], 1).repeat(1, noise["dn_num_group"] * noisy.shape[1])
    chosen = assign_one(logits.detach(), boxes.detach(), classes, truth)
    dense, dense_boxes = output.enc_outputs_class, output.enc_outputs_coord_logits.sigmoid()
    several = assign_many(dense.detach(), dense_boxes.detach(), classes, truth, anchors)
    count = (classes >= 0).sum()
    return (
        set_loss(logits.flatten(1, 2), boxes.flatten(1, 2), chosen.flatten(1), classes, truth) / count
        + set_loss(noisy.flatten(1, 2), noisy_boxes.flatten(1, 2), groups, classes, truth)
        / count
        / noise["dn_num_group"]
        + set_loss(dense, dense_boxes, several, classes, truth) / (several >= 0).sum().clamp(min=1)
    )
