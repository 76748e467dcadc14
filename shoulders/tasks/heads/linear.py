"""Logistic regression on one vector per image, and its head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Vectors (B, C) to logits (B, K): standardize, then one linear map; initially zero weights, mean 0 and std 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.weights = nn.Parameter(torch.zeros(width + 1, n_classes))  # the last row is the bias

    def standardize(self, x: Tensor) -> Tensor:
        """(B, C) minus the mean, over the standard deviation of the images that the head was fitted on."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of vectors (B, C)."""
        return linear_logits(self.weights, self.standardize(x))


def linear_logits(weights: Tensor, x: Tensor) -> Tensor:
    """(n, K) of weights (C + 1, K), the last row the bias, and vectors (n, C)."""
    return torch.addmm(weights[-1], x, weights[:-1])


def fit_logistic(
    x: Tensor, labels: Tensor, n_classes: int, l2: float, start: Tensor | None = None, max_iterations: int = 100
) -> Tensor:
    """Weights (C + 1, K), the last row the bias, that minimise mean cross-entropy + l2 / 2 |weights|^2.

    The bias is not regularized. Full-batch L-BFGS, from ``start`` or from zero.

    Args:
        x: (n, C).
        labels: (n,) in [0, K).
    """
    weights = torch.zeros(x.shape[1] + 1, n_classes) if start is None else start.clone()  # (C + 1, K)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=max_iterations, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear_logits(weights, x), labels) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
