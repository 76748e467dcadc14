"""How much each teacher counts for each image: weights (B, T); a weight of 0 leaves the teacher out of the image.

``teacher_mask`` (B, T) is 1 where a teacher has features of an image, else 0. The share of a teacher without features
goes to the other teachers of the image, so that an image counts as much however many teachers it has. The weights of an
image without teachers are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(losses: Tensor, teacher_mask: Tensor) -> Tensor:
    """Every teacher of an image counts the same: (B, T), an image's weights sum to T."""
    return teacher_mask * (losses.shape[1] / teacher_mask.sum(1, keepdim=True).clamp_min(1))


def fixed(losses: Tensor, teacher_mask: Tensor, weights: Sequence[float]) -> Tensor:
    """`uniform`, times the weight that the recipe gives each teacher."""
    return uniform(losses, teacher_mask) * torch.tensor(weights, dtype=losses.dtype, device=losses.device)


def dropping(losses: Tensor, teacher_mask: Tensor, drop_uniforms: Tensor, keep: float = 0.5) -> Tensor:
    """Keep each image's worst teacher, drop every other with probability 1 - keep (UNIC, arXiv 2408.05088).

    Args:
        losses: (B, T) transfer loss of each teacher on each image; 0 where it has no features.
        drop_uniforms: (B, T) uniform numbers in [0, 1), drawn by the caller so that they depend on the step alone.

    Returns:
        (B, T), scaled so that an image's weights sum to T: an image with few teachers left counts as much as others.
    """
    worst = torch.zeros_like(losses).scatter_(1, losses.detach().argmax(1, keepdim=True), 1.0)
    kept = torch.maximum(worst, (drop_uniforms < keep).to(losses.dtype)) * teacher_mask
    return kept * losses.shape[1] / kept.sum(1, keepdim=True).clamp_min(1)
