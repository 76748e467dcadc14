"""How much each teacher counts for each image: weights (B, T); a weight of 0 leaves the teacher out of the image.

``asked`` (B, T) is 1 where a teacher was asked about an image, else 0: its part in an image that it was not asked about
goes to those who were, so that an image counts as much however many speak of it. Zeros where nobody was asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(losses: Tensor, asked: Tensor) -> Tensor:
    """Every teacher that was asked counts the same: (B, T), an image's weights sum to T."""
    return asked * (losses.shape[1] / asked.sum(1, keepdim=True).clamp_min(1))


def fixed(losses: Tensor, asked: Tensor, shares: Sequence[float]) -> Tensor:
    """`uniform`, times what the user chose for each teacher."""
    return uniform(losses, asked) * torch.tensor(shares, dtype=losses.dtype, device=losses.device)


def dropping(losses: Tensor, asked: Tensor, coins: Tensor, keep: float = 0.5) -> Tensor:
    """Keep each image's worst teacher, drop every other with probability 1 - keep (UNIC, arXiv 2408.05088).

    Args:
        losses: (B, T) transfer loss of each teacher on each image; 0 where it was not asked.
        coins: (B, T) uniform numbers in [0, 1), drawn by the caller so that they depend on the step alone.

    Returns:
        (B, T), scaled so that an image's weights sum to T: an image with few teachers left counts as much as others.
    """
    worst = torch.zeros_like(losses).scatter_(1, losses.detach().argmax(1, keepdim=True), 1.0)
    kept = torch.maximum(worst, (coins < keep).to(losses.dtype)) * asked
    return kept * losses.shape[1] / kept.sum(1, keepdim=True).clamp_min(1)
