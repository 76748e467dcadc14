"""Fraction of variance unexplained: how much of a teacher the latent does not hold (0 all of it held, 1 none)."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-6, 3))


def fvu(latents: Tensor, targets: Tensor) -> float:
    """Residual over variance after a ridge map fitted on the first half of the images and scored on the second.

    Args:
        latents: (n, P, D), P places of n images (P = 1 for summaries).
        targets: (n, P, C) of the same places.

    Both are standardized per channel with the statistics of the first half, so that no wide or loud channel
    decides; the ridge is the best of ``RIDGES`` by generalised cross-validation on the first half.
    """
    half = len(latents) // 2
    x_fit, y_fit, x, y = (rows.flatten(0, 1).double() for rows in (
        latents[:half], targets[:half], latents[half:], targets[half:]
    ))  # fmt: skip
    x_fit, x = _standardized(x_fit, x)
    y_fit, y = _standardized(y_fit, y)
    n = len(x_fit)
    values, basis = torch.linalg.eigh(x_fit.T @ x_fit / n)  # (D,), (D, D)
    values = values.clamp_min(0)
    seen = basis.T @ (x_fit.T @ y_fit) / n  # (D, C), cross-covariance in the basis
    variance = y_fit.square().sum() / n

    def gcv(ridge: float) -> float:
        shrink = 1 / (values + ridge)
        explained = ((2 * shrink - values * shrink**2)[:, None] * seen.square()).sum()
        # one degree of freedom goes to the mean
        freedom = 1 - ((values * shrink).sum() + 1) / n
        return float((variance - explained) / freedom.clamp_min(1e-6) ** 2)

    ridge = min(RIDGES, key=gcv)
    weights = basis @ (seen / (values + ridge)[:, None])
    return unexplained(x @ weights, y)


def unexplained(guess: Tensor, target: Tensor) -> float:
    """Residual over variance of (n, C), both summed over channels."""
    residual = (guess - target).square().sum()
    return float(residual / (target - target.mean(0)).square().sum().clamp_min(1e-12))


def channel_standardized(fit: Tensor, *others: Tensor) -> list[Tensor]:
    """``fit`` and ``others`` (n, C) with the channel means and deviations of ``fit``; constant channels become 0."""
    mean, std = fit.mean(0), fit.std(0)
    live = std > 1e-6 * (1 + mean.abs())
    return [torch.where(live, (rows - mean) / torch.where(live, std, 1.0), 0.0) for rows in (fit, *others)]


def _standardized(fit: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    fitted, scored = channel_standardized(fit, score)
    return fitted, scored
