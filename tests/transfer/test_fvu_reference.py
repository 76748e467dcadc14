"""fvu against a second implementation: a linear system solved for each ridge, on whole images of either fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoulders.transfer.fvu import channel_standardized, fvu, is_constant, unexplained

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(D, C) that minimizes mean |x w - y|^2 + ridge |w|^2."""
    return torch.linalg.solve(x.T @ x + len(x) * ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def standardized(values: Tensor, images: int) -> Tensor:
    """(n, P, C) with the statistics of the first ``images`` images."""
    values = values.double()
    tokens = values[:images].flatten(0, 1)
    return (values - tokens.mean(0)) / ((tokens - tokens.mean(0)).square().sum(0) / (len(tokens) - 1)).sqrt()


def selected_ridge(x: Tensor, y: Tensor, first_fold: int) -> float:
    """The ridge of the least squared error over both folds of tokens (n, C), each predicted from the other."""
    errors = []
    for ridge in RIDGES:
        folds = [(slice(first_fold), slice(first_fold, None)), (slice(first_fold, None), slice(first_fold))]
        errors.append(sum(float((x[b] @ ridge_map(x[a], y[a], ridge) - y[b]).square().sum()) for a, b in folds))
    return RIDGES[errors.index(min(errors))]


def reference(latents: Tensor, targets: Tensor) -> float:
    half = len(latents) // 2
    x, y = standardized(latents, half), standardized(targets, half)
    x_fit, y_fit, x, y = (part.flatten(0, 1) for part in (x[:half], y[:half], x[half:], y[half:]))
    guess = x @ ridge_map(x_fit, y_fit, selected_ridge(x_fit, y_fit, half // 2 * latents.shape[1]))
    return float((guess - y).square().sum() / (y - y.mean(0)).square().sum())


def alike_tokens(seed: int, images: int = 14, tokens: int = 5) -> tuple[Tensor, Tensor]:
    """Latents (n, P, 8) and targets (n, P, 3) that differ between images and hardly inside one."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(images, 1, 8, generator=generator) + 0.1 * torch.randn(images, tokens, 8, generator=generator)
    targets = latents[..., :3] + 2 * torch.randn(images, 1, 3, generator=generator)
    return latents, targets + 0.01 * torch.randn(images, tokens, 3, generator=generator)


@pytest.mark.parametrize("seed", [5, 13, 42])
def test_the_ridge_is_selected_between_whole_images(seed: int) -> None:
    """Tokens of one image are alike: a fold that shares an image with the other selects another ridge."""
    latents, targets = alike_tokens(seed)
    x, y = (standardized(values, 7)[:7].flatten(0, 1) for values in (latents, targets))
    assert selected_ridge(x, y, 3 * 5) != selected_ridge(x, y, 7 * 5 // 2)  # 7 images of 5 tokens: 3 whole ones
    assert fvu(latents, targets) == pytest.approx(reference(latents, targets), rel=1e-7)


def test_ridges_reach_from_1e_6_to_100() -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(60, 2, 5, generator=generator)
    noise = torch.randn(60, 2, 3, generator=generator)
    assert fvu(latents, noise) == pytest.approx(reference(latents, noise), rel=1e-9)  # the largest is the best
    exact = latents @ torch.randn(5, 3, generator=generator)
    assert fvu(latents, exact) == pytest.approx(reference(latents, exact), rel=1e-3)  # the smallest is the best
    assert 1e-13 < fvu(latents, exact) < 1e-11


def test_unexplained_is_residual_over_variance() -> None:
    target = torch.tensor([[1.0, 10.0], [3.0, 14.0]])  # squared deviations: 1 + 1 + 4 + 4
    assert unexplained(target + torch.tensor([1.0, -2.0]), target) == pytest.approx(1.0)  # residuals: 1 + 1 + 4 + 4
    assert unexplained(target.mean(0).expand(2, 2), target) == pytest.approx(1.0)
    assert unexplained(target, target) == 0
    # a target without variance counts as one of variance 1e-12
    assert unexplained(torch.full((1, 1), 1e-6), torch.zeros(1, 1)) == pytest.approx(1.0)
    assert unexplained(torch.zeros(1, 1), torch.zeros(1, 1)) == 0


def test_channels_of_almost_no_deviation_become_zero() -> None:
    """The limit is 1e-6 (1 + |mean|): 1e-5 for channels of mean -9, whose deviations are .95e-5, 1.05e-5 and 3."""
    steps = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None]  # deviation 1
    fit = -9 + steps * torch.tensor([0.95e-5, 1.05e-5, 3.0], dtype=torch.float64)
    other = torch.tensor([[0.0, -9.0, -6.0]], dtype=torch.float64)
    fit, other = channel_standardized(fit, other)
    assert torch.allclose(fit, steps * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), atol=1e-8)
    assert torch.allclose(other, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), atol=1e-8)


def test_vectors_are_constant_where_no_channel_varies_in_the_first_half() -> None:
    constant = torch.full((7, 2, 3), 0.5)  # its first half is 3 images
    assert is_constant(constant)
    for image, expected in ((0, False), (2, False), (3, True), (6, True)):
        vectors = constant.clone()
        vectors[image, 1, 2] = 0.6  # one channel of one token
        assert is_constant(vectors) == expected
    assert not is_constant(torch.where(constant > 0, float("nan"), 0.0))
    one_is_not_finite = constant.clone()
    one_is_not_finite[0, 0, 0] = float("nan")
    assert not is_constant(one_is_not_finite)
    between_images = constant + torch.arange(7.0)[:, None, None]  # the tokens of an image are alike
    inside_images = constant + torch.arange(2.0)[None, :, None]  # all images are alike
    assert not is_constant(between_images) and not is_constant(inside_images)
