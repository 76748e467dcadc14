"""Fraction of variance unexplained: how much of a teacher the latent does not hold (0 all of it held, 1 none)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-6, 3))


def fvu(latents: Tensor, targets: Tensor) -> float:
    """Residual over variance after a ridge map fitted on the first half of the images and scored on the second.

    Args:
        latents: (n, P, D), P places of n images (P = 1 for summaries).
        targets: (n, P, C) of the same places.

    Both are standardized per channel with the statistics of the first half, so that no wide or loud channel
    decides; the ridge is the best of ``RIDGES`` between the two quarters of the first half.
    """
    half = len(latents) // 2
    x_fit, y_fit, x, y = (
        rows.flatten(0, 1).double() for rows in (latents[:half], targets[:half], latents[half:], targets[half:])
    )
    x_fit, x = channel_standardized(x_fit, x)
    y_fit, y = channel_standardized(y_fit, y)
    middle = half // 2 * latents.shape[1]  # whole images on either side: places of one image are alike
    one, other = (x_fit[:middle], y_fit[:middle]), (x_fit[middle:], y_fit[middle:])
    maps = [(_ridge_maps(*one), other), (_ridge_maps(*other), one)]
    residuals = {ridge: sum(float((x @ solve(ridge) - y).square().sum()) for solve, (x, y) in maps) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: residuals[ridge])
    return unexplained(x @ _ridge_maps(x_fit, y_fit)(best), y)


def _ridge_maps(x: Tensor, y: Tensor) -> Callable[[float], Tensor]:
    """For x (n, D) and y (n, C): ridge -> (D, C), from one decomposition."""
    values, basis = torch.linalg.eigh(x.T @ x / len(x))  # (D,), (D, D)
    cross = basis.T @ (x.T @ y) / len(x)  # (D, C)
    return lambda ridge: basis @ (cross / (values.clamp_min(0) + ridge)[:, None])


def unexplained(guess: Tensor, target: Tensor) -> float:
    """Residual over variance of (n, C), both summed over channels."""
    residual = (guess - target).square().sum()
    return float(residual / (target - target.mean(0)).square().sum().clamp_min(1e-12))


def channel_standardized(fit: Tensor, *others: Tensor) -> list[Tensor]:
    """``fit`` and ``others`` (n, C) with the channel means and deviations of ``fit``; constant channels become 0."""
    mean, std = fit.mean(0), fit.std(0)
    live = std > 1e-6 * (1 + mean.abs())
    return [torch.where(live, (rows - mean) / torch.where(live, std, 1.0), 0.0) for rows in (fit, *others)]
