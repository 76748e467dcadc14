"""Distances between prediction and target: pure functions (B, ..., C), (B, ..., C) -> (B,)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity per vector, averaged over tokens."""
    similarity = F.cosine_similarity(prediction, target, dim=-1)  # (B, ...)
    return (1 - similarity).reshape(len(prediction), math.prod(prediction.shape[1:-1])).mean(1)


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 (beta 1), averaged over channels and tokens."""
    return F.smooth_l1_loss(prediction, target, reduction="none").flatten(1).mean(1)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared difference, averaged over channels and tokens."""
    return (prediction - target).square().flatten(1).mean(1)


def cosine_smooth_l1(prediction: Tensor, target: Tensor, a: float) -> Tensor:
    """a (1 - cosine) + (1 - a) smooth-L1, per vector (Theia, arXiv 2407.20179, with a = 0.9)."""
    return a * cosine(prediction, target) + (1 - a) * smooth_l1(prediction, target)


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
