"""How much each teacher counts for each image: weights (B, T); a weight of 0 leaves the teacher out of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def among(weights: Tensor, asked: Tensor) -> Tensor:
    """Share each image's weights out among the teachers that were asked about it; their sum stays.

    Args:
        weights: (B, T).
        asked: (B, T) 1 where a teacher was asked, else 0.

    Returns:
        (B, T), zeros where nobody was asked.
    """
    kept = weights * asked
    return kept * weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1e-12)


def uniform(losses: Tensor) -> Tensor:
    """Every teacher counts the same: ones (B, T)."""
    return torch.ones_like(losses)


def fixed(losses: Tensor, shares: Sequence[float]) -> Tensor:
    """Weights chosen by the user, one per teacher."""
    return torch.tensor(shares, dtype=losses.dtype, device=losses.device).expand_as(losses)


def dropping(losses: Tensor, coins: Tensor, keep: float = 0.5) -> Tensor:
    """Keep each image's worst teacher, drop every other with probability 1 - keep (UNIC, arXiv 2408.05088).

    Args:
        losses: (B, T) transfer loss of each teacher on each image.
        coins: (B, T) uniform numbers in [0, 1), drawn by the caller so that they depend on the step alone.

    Returns:
        (B, T), scaled so that an image's weights sum to T: an image with few teachers left counts as much as others.
    """
    worst = torch.zeros_like(losses).scatter_(1, losses.detach().argmax(1, keepdim=True), 1.0)
    kept = torch.maximum(worst, (coins < keep).to(losses.dtype))
    return kept * losses.shape[1] / kept.sum(1, keepdim=True)
