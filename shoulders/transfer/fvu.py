"""Fraction of variance unexplained: how much of a teacher's features the latent lacks (0 nothing, 1 everything)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-6, 3))


def fvu(latents: Tensor, targets: Tensor, ridges: Sequence[float] = RIDGES) -> float:
    """Residual over variance after a ridge map fitted on the first half of the images and scored on the second.

    Both inputs are standardized per channel with the statistics of the first half, so that no wide channel and no
    channel of large magnitude decides; the ridge is the best one between the two quarters of the first half.

    Args:
        latents: (n, P, D), P tokens of n images (P = 1 for summaries).
        targets: (n, P, C) of the same tokens.
        ridges: from which the best is selected.

    Returns:
        nan if any value is not finite.
    """
    if not (latents.isfinite().all() and targets.isfinite().all()):
        return math.nan
    half = len(latents) // 2
    x_fit, y_fit, x, y = (
        vectors.flatten(0, 1).double() for vectors in (latents[:half], targets[:half], latents[half:], targets[half:])
    )
    x_fit, x = channel_standardized(x_fit, x)
    y_fit, y = channel_standardized(y_fit, y)
    middle = half // 2 * latents.shape[1]  # whole images on either side: tokens of one image are alike
    one, other = (x_fit[:middle], y_fit[:middle]), (x_fit[middle:], y_fit[middle:])
    maps = [(_ridge_maps(*one), other), (_ridge_maps(*other), one)]
    residuals = {ridge: sum(float((x @ solve(ridge) - y).square().sum()) for solve, (x, y) in maps) for ridge in ridges}
    best = min(ridges, key=lambda ridge: residuals[ridge])
    return unexplained(x @ _ridge_maps(x_fit, y_fit)(best), y)


def _ridge_maps(x: Tensor, y: Tensor) -> Callable[[float], Tensor]:
    """For x (n, D) and y (n, C): ridge -> (D, C), from one decomposition."""
    values, basis = torch.linalg.eigh(x.T @ x / len(x))  # (D,), (D, D)
    cross = basis.T @ (x.T @ y) / len(x)  # (D, C)
    return lambda ridge: basis @ (cross / (values.clamp_min(0) + ridge)[:, None])


def unexplained(prediction: Tensor, target: Tensor) -> float:
    """Residual over variance of (n, C), both summed over channels."""
    residual = (prediction - target).square().sum()
    return float(residual / (target - target.mean(0)).square().sum().clamp_min(1e-12))


def channel_standardized(fit: Tensor, *others: Tensor) -> list[Tensor]:
    """``fit`` and ``others`` (n, C) with the channel means and deviations of ``fit``; constant channels become 0."""
    mean, std = fit.mean(0), fit.std(0)
    live = _varying_channels(fit)
    return [torch.where(live, (vectors - mean) / torch.where(live, std, 1.0), 0.0) for vectors in (fit, *others)]


def is_constant(vectors: Tensor) -> bool:
    """Whether `fvu` has nothing to explain in vectors (n, P, C): no channel varies in the first half of the images."""
    first_half = vectors[: len(vectors) // 2].flatten(0, 1).double()
    return not bool(_varying_channels(first_half).any())


def _varying_channels(vectors: Tensor) -> Tensor:
    """(C,) bool, of vectors (n, C): which channels vary by more than rounding does, or are not finite."""
    return ~(vectors.std(0) <= 1e-6 * (1 + vectors.mean(0).abs()))
