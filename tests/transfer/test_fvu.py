"""The fraction of variance unexplained, against closed forms and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from shoulders.transfer.fvu import RIDGES, channel_standardized, fvu, is_constant, unexplained


def test_a_linear_image_of_the_latent_has_fvu_0_and_noise_has_1() -> None:
    torch.manual_seed(0)
    latents = torch.randn(400, 4, 10)
    assert fvu(latents, latents @ torch.randn(10, 6) * 100 + 3) < 1e-6
    assert fvu(latents, torch.randn(400, 4, 6)) == pytest.approx(1, abs=0.03)


def test_fvu_does_not_depend_on_the_magnitude_of_channels() -> None:
    torch.manual_seed(0)
    latents = torch.randn(2000, 1, 6)
    explained = latents @ torch.linalg.qr(torch.randn(6, 6))[0]
    targets = (explained + torch.randn(2000, 1, 6)) * torch.logspace(-3, 3, 6)
    assert fvu(latents, targets) == pytest.approx(0.5, abs=0.03)


def standardized_halves(latents: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vectors of the first half of the images and of the second: x and y of both, in this order."""
    x, y = (tensor.flatten(0, 1).double() for tensor in (latents, targets))
    half = len(latents) // 2 * latents.shape[1]
    x, y = ((tensor - tensor[:half].mean(0)) / tensor[:half].std(0) for tensor in (x, y))
    return x[:half], y[:half], x[half:], y[half:]


def ridge_predictions(x: torch.Tensor, y: torch.Tensor, new: torch.Tensor, ridge: float) -> torch.Tensor:
    """Predictions for ``new`` by scikit-learn's ridge regression fitted on x and y."""
    model = Ridge(alpha=ridge * len(x), fit_intercept=False).fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.predict(new.numpy()))


def sklearn_fvu(latents: torch.Tensor, targets: torch.Tensor, ridge: float) -> float:
    """fvu with one given ridge."""
    x_fit, y_fit, x, y = standardized_halves(latents, targets)
    return unexplained(ridge_predictions(x_fit, y_fit, x, ridge), y)


def selected_ridge(latents: torch.Tensor, targets: torch.Tensor, middle: int) -> float:
    """The ridge with the least squared error, each of the two parts of the first half predicted from the other."""
    x, y, _, _ = standardized_halves(latents, targets)
    folds = [(slice(None, middle), slice(middle, None)), (slice(middle, None), slice(None, middle))]

    def error(ridge: float) -> float:
        return sum(
            (ridge_predictions(x[fit], y[fit], x[new], ridge) - y[new]).square().sum().item() for fit, new in folds
        )

    return min(RIDGES, key=error)


def test_the_map_is_scikit_learns_ridge_regression() -> None:
    torch.manual_seed(0)
    latents, targets = torch.randn(100, 3, 8), torch.randn(100, 3, 5)
    targets = targets + latents @ torch.randn(8, 5)
    assert fvu(latents, targets, ridges=(0.1,)) == pytest.approx(sklearn_fvu(latents, targets, 0.1), rel=1e-9)


def test_more_channels_than_images_do_not_overfit() -> None:
    torch.manual_seed(0)
    assert 0.95 < fvu(torch.randn(300, 1, 400), torch.randn(300, 1, 20)) < 1.1


def test_the_ridge_is_selected_between_whole_images() -> None:
    """5 images to fit on, of nearly equal tokens: a split inside the third would select another ridge."""
    torch.manual_seed(3)
    latents = torch.randn(10, 1, 10).expand(10, 20, 10) + 0.1 * torch.randn(10, 20, 10)
    targets = torch.randn(10, 1, 4).expand(10, 20, 4)
    between, inside = (selected_ridge(latents, targets, middle) for middle in (2 * 20, 5 * 20 // 2))
    assert between > 100 * inside
    assert fvu(latents, targets) == pytest.approx(sklearn_fvu(latents, targets, between), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("image", [1, 30])  # of the half that fits, and of the other
def test_what_is_not_finite_has_no_fvu(value: float, image: int) -> None:
    """Before, every channel of such targets counted as constant, and the fvu was 0: everything explained."""
    x = torch.randn(40, 1, 5, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[image] = value
    assert math.isnan(fvu(x, broken)) and math.isnan(fvu(broken, x))
    assert not is_constant(broken)
    (standardized,) = channel_standardized(broken.flatten(0, 1))
    assert not standardized.isfinite().all()
