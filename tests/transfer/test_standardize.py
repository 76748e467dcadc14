"""Standardizers: means, variances and inverses of every kind."""

from __future__ import annotations

import pytest
import torch

from shoulders.features import Features
from shoulders.transfer.standardize import Moments, Standardizer, TapStandardizer, equal_variance_rotation


def correlated(n: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(-2, 2, width)[:, None]
    return torch.randn(n, width, generator=generator) @ mix + 5 * torch.randn(width, generator=generator)


def fitted(kind: str, x: torch.Tensor) -> Standardizer:
    moments = Moments(x.shape[-1])
    for chunk in x.split(100):
        moments.update(chunk)
    standardizer = Standardizer(kind, x.shape[-1])
    standardizer.fit(moments)
    return standardizer


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
@pytest.mark.parametrize("width", [2, 8, 12, 30])
def test_every_channel_has_mean_0_and_variance_1(kind: str, width: int) -> None:
    x = correlated(4000, width)
    y = fitted(kind, x)(x)
    assert torch.allclose(y.mean(0), torch.zeros(width), atol=2e-3)
    assert torch.allclose(y.var(0, correction=0), torch.ones(width), atol=2e-2)


@pytest.mark.parametrize("width", [1, 2, 3, 12, 16, 48])
def test_phi_s_is_one_scalar_times_an_orthogonal_map(width: int) -> None:
    x = correlated(500, width)
    rotation = equal_variance_rotation(torch.cov(x.T, correction=0).reshape(width, width)).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), atol=1e-5)
    y = fitted("phi_s", x)(x)
    # all distances shrink by one factor, whatever their direction
    factors = torch.pdist(y[:50]) / torch.pdist(x[:50])
    assert factors.max() / factors.min() < 1.001


@pytest.mark.parametrize("kind", ["none", "channel", "phi_s"])
def test_inverse_gives_the_teachers_own_space_back(kind: str) -> None:
    x = correlated(300, 12)
    standardizer = fitted(kind, x)
    assert torch.allclose(standardizer.inverse(standardizer(x)), x, rtol=1e-3, atol=1e-2)


def test_none_changes_nothing_and_a_constant_channel_is_only_centred() -> None:
    x = correlated(300, 6)
    assert torch.equal(fitted("none", x)(x), x)
    x[:, 2] = 7.0
    y = fitted("channel", x)(x)
    assert torch.isfinite(y).all()
    assert y[:, 2].abs().max() < 1e-3


def test_summary_and_spatial_have_their_own_statistics() -> None:
    tap = TapStandardizer("channel", 3, 4)
    summary, spatial = correlated(200, 3), correlated(800, 4, seed=1).view(200, 4, 4)
    moments = {"summary": Moments(3), "spatial": Moments(4)}
    moments["summary"].update(summary)
    moments["spatial"].update(spatial)
    tap.fit(moments)
    out = tap(Features(summary, spatial, (2, 2)))
    assert out.components()["summary"].std(0, correction=0).tolist() == pytest.approx([1] * 3, abs=1e-2)
    assert out.components()["spatial"].flatten(0, 1).std(0, correction=0).tolist() == pytest.approx([1] * 4, abs=1e-2)


def test_an_unknown_kind_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="none, channel, phi_s"):
        Standardizer("whiten", 4)


def test_phi_s_stays_one_scalar_where_a_channel_is_far_from_zero() -> None:
    x = 0.01 * torch.randn(4000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] += 2e4
    moments = Moments(6)
    moments.update(x)
    standardizer = Standardizer("phi_s", 6)
    standardizer.fit(moments)
    assert len(standardizer.std.unique()) == 1


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
@pytest.mark.parametrize("constants", [1, 4])
def test_channels_without_variance_in_bfloat16_stay_finite(kind: str, constants: int) -> None:
    """What is left of a variance below the steps of bfloat16 is 0: such a channel is centred, and not divided by it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    x[:, :constants] = 300 + 1e-3 * x[:, :constants]  # a step of bfloat16 is 2 there
    x = x.to(torch.bfloat16)
    moments = Moments(4)
    moments.update(x)
    standardizer = Standardizer(kind, 4)
    standardizer.fit(moments)
    standardized = standardizer(x)
    assert standardized.isfinite().all() and standardized.abs().max() < 10
    assert torch.allclose(standardizer.inverse(standardized), x.float(), atol=1e-2)
