"""Distances between inherited and taught vectors: pure functions (B, ..., C), (B, ..., C) -> (B,)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - cosine similarity per vector, averaged over places."""
    return (1 - F.cosine_similarity(ours, theirs, dim=-1)).reshape(len(ours), math.prod(ours.shape[1:-1])).mean(1)


def smooth_l1(ours: Tensor, theirs: Tensor) -> Tensor:
    """Smooth L1 (beta 1), averaged over channels and places."""
    return F.smooth_l1_loss(ours, theirs, reduction="none").flatten(1).mean(1)


def mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared difference, averaged over channels and places."""
    return (ours - theirs).square().flatten(1).mean(1)


def cosine_smooth_l1(ours: Tensor, theirs: Tensor, a: float) -> Tensor:
    """a (1 - cosine) + (1 - a) smooth-L1, per vector (Theia, arXiv 2407.20179, with a = 0.9)."""
    return a * cosine(ours, theirs) + (1 - a) * smooth_l1(ours, theirs)


def distance(kind: str, cosine_weight: float = 0.9) -> Distance:
    """The distance called ``kind``.

    Raises:
        ValueError: for a kind that is not in the table.
    """
    table: dict[str, Distance] = {
        "cosine_smooth_l1": partial(cosine_smooth_l1, a=cosine_weight),
        "cosine": cosine,
        "smooth_l1": smooth_l1,
        "mse": mse,
    }
    if kind not in table:
        raise ValueError(f"distance {kind!r} is not one of {', '.join(table)}")
    return table[kind]
