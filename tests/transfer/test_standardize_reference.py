"""Standardizers in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoulders.transfer.standardize import Moments, Standardizer, TapStandardizer, equal_variance_rotation


def moments_of(x: Tensor) -> Moments:
    moments = Moments(x.shape[-1])
    moments.update(x)
    return moments


def test_moments_are_mean_and_covariance_of_all_vectors() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    moments = Moments(5)
    for part in (x[:1], x[1:]):
        moments.update(part)
    assert moments.count == 12 and not moments.total.requires_grad
    vectors = x.detach().double().flatten(0, 1)
    torch.testing.assert_close(moments.mean, vectors.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(vectors.T, correction=0))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_phi_s_is_a_hadamard_matrix_on_the_principal_axes(width: int) -> None:
    """PHI-S, arXiv 2410.01680: H U^T; where H exists, each new channel holds as much of every principal axis."""
    x = torch.randn(50, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = torch.cov((x * torch.arange(1, width + 1)).T, correction=0).reshape(width, width)
    axes = torch.linalg.eigh(covariance)[1]
    rotation = equal_variance_rotation(covariance).double()
    torch.testing.assert_close(
        (rotation @ axes).abs(), torch.full((width, width), width**-0.5, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert len(rotation.round(decimals=4).unique(dim=0)) == width


@pytest.mark.parametrize("width", [3, 5, 6])
def test_givens_rotations_give_every_channel_the_mean_variance(width: int) -> None:
    x = torch.randn(50, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    growing = torch.arange(1.0, width + 1)
    for factors in (growing, 1e-7 * growing, torch.tensor([1000.0] + [1.0] * (width - 1)), torch.zeros(width)):
        covariance = torch.cov((x * factors).T, correction=0)
        rotation = equal_variance_rotation(covariance).double()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), atol=1e-6, rtol=0)
        variances = (rotation @ covariance @ rotation.T).diagonal()
        torch.testing.assert_close(variances, covariance.trace().expand(width) / width, atol=0, rtol=1e-5)


def test_channels_of_equal_variance_are_not_mixed() -> None:
    rotation = equal_variance_rotation(2 * torch.eye(3))
    assert torch.equal(rotation.abs().sort(dim=1)[0], torch.tensor([[0.0, 0.0, 1.0]] * 3))


def test_the_scale_of_each_kind() -> None:
    """Channels of means 1 and 2, deviations 3 and 4, without correlation."""
    x = torch.tensor([[-2.0, -2.0], [4.0, -2.0], [-2.0, 6.0], [4.0, 6.0]])
    for kind, mean, std in (
        ("none", [0.0, 0.0], [1.0, 1.0]),
        ("channel", [1.0, 2.0], [3.0, 4.0]),
        ("phi_s", [1.0, 2.0], [12.5**0.5, 12.5**0.5]),  # the mean variance
    ):
        standardizer = Standardizer(kind, 2)
        standardizer.fit(moments_of(x))
        torch.testing.assert_close(standardizer.mean, torch.tensor(mean))
        torch.testing.assert_close(standardizer.std, torch.tensor(std))
        rotation = torch.eye(2) if standardizer.rotation is None else standardizer.rotation
        torch.testing.assert_close(standardizer(x), (x - torch.tensor(mean)) / torch.tensor(std) @ rotation.T)
        torch.testing.assert_close(standardizer.inverse(standardizer(x)), x)


@pytest.mark.parametrize(("factor", "kept"), [(0.95, False), (1.05, True)])
@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_variances_below_what_rounding_leaves_are_not_divided_by(kind: str, factor: float, kept: bool) -> None:
    """The limit is 1e-12 (1 + mean^2): 1e-11 for a channel of mean 3."""
    deviation = (factor * 1e-11) ** 0.5
    x = 3 + torch.tensor([[-deviation, deviation], [deviation, deviation]], dtype=torch.float64) * torch.tensor([1, -1])
    x = torch.cat([x, 6 - x])  # both channels have this deviation
    standardizer = Standardizer(kind, 2)
    standardizer.fit(moments_of(x))
    assert standardizer.std.tolist() == pytest.approx([deviation if kept else 1.0] * 2, rel=1e-2)


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_statistics_are_applied_in_float32_under_autocast_too(kind: str) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 5
    standardizer = Standardizer(kind, 6)
    standardizer.fit(moments_of(x))
    standardized = standardizer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(standardizer(x), standardized)
        inverse = standardizer.inverse(standardized)
    assert torch.equal(inverse, standardizer.inverse(standardized))
    torch.testing.assert_close(inverse, x)


def test_a_tap_has_a_standardizer_for_each_component_that_it_has() -> None:
    assert set(TapStandardizer("channel", 3, None).parts) == {"summary"}
    assert set(TapStandardizer("channel", None, 4).parts) == {"spatial"}
