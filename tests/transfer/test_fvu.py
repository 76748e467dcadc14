from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from shoulders.transfer import fvu as measured
from shoulders.transfer.fvu import fvu, unexplained


def test_a_linear_image_of_the_latent_is_held_completely_and_noise_not_at_all() -> None:
    torch.manual_seed(0)
    latents = torch.randn(400, 4, 10)
    assert fvu(latents, latents @ torch.randn(10, 6) * 100 + 3) < 1e-6
    assert fvu(latents, torch.randn(400, 4, 6)) == pytest.approx(1, abs=0.03)


def test_half_of_the_variance_is_half_whatever_the_channels_magnitudes() -> None:
    torch.manual_seed(0)
    latents = torch.randn(2000, 1, 6)
    held = latents @ torch.linalg.qr(torch.randn(6, 6))[0]
    targets = (held + torch.randn(2000, 1, 6)) * torch.logspace(-3, 3, 6)
    assert fvu(latents, targets) == pytest.approx(0.5, abs=0.03)


def test_it_is_scikit_learns_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "RIDGES", (0.1,))
    torch.manual_seed(0)
    latents, targets = torch.randn(100, 3, 8), torch.randn(100, 3, 5)
    targets = targets + latents @ torch.randn(8, 5)
    x, y = (t.flatten(0, 1).double() for t in (latents, targets))
    half = 150
    xs, ys = ((t - t[:half].mean(0)) / t[:half].std(0) for t in (x, y))
    model = Ridge(alpha=0.1 * half, fit_intercept=False).fit(xs[:half].numpy(), ys[:half].numpy())
    guess = torch.from_numpy(model.predict(xs[half:].numpy()))
    assert fvu(latents, targets) == pytest.approx(unexplained(guess, ys[half:]), rel=1e-9)


def test_more_channels_than_images_do_not_fool_it() -> None:
    torch.manual_seed(0)
    assert 0.95 < fvu(torch.randn(300, 1, 400), torch.randn(300, 1, 20)) < 1.1
