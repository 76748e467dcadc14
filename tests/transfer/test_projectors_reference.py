"""Projectors against loops over tokens, and the grids between which they map."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from shoulders.features import Features
from shoulders.transfer.projectors import (
    FeatureDims,
    JointToStudent,
    ProjectorMLP,
    avg_pool_grid,
    downsample_factors,
    scatter_rows,
    upsample_factors,
)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_each_token_gives_its_own_square_of_the_finer_grid(factor: int) -> None:
    torch.manual_seed(0)
    h, w, layers = 2, 3, ("block0", "latent")
    mlp = ProjectorMLP(5, layers, 12, 4, factor)
    features = {layer: torch.randn(2, h * w, 5) for layer in layers}
    output = mlp(features, (h, w)).view(2, h * factor, w * factor, 4)
    hidden_width = 12 // factor
    for token in range(h * w):
        products = [features[layer][:, token] @ mlp.get_parameter(f"first.{layer}.weight").T for layer in layers]
        sums = products[0] + products[1] + mlp.get_parameter("first.block0.bias")  # one bias for the sum
        for i in range(factor):
            for j in range(factor):
                start = (i * factor + j) * hidden_width
                expected = mlp.last(F.gelu(sums[:, start : start + hidden_width]))
                row, column = token // w * factor + i, token % w * factor + j
                assert torch.allclose(output[:, row, column], expected, atol=1e-6)


def test_a_projector_keeps_the_grid_by_default() -> None:
    mlp = ProjectorMLP(5, ["latent"], 12, 4)
    assert mlp.upsample == 1 and mlp({"latent": torch.randn(2, 6, 5)}, (2, 3)).shape == (2, 6, 4)


@pytest.mark.parametrize(
    ("grid", "factor"),
    [((4, 6), 2), ((6, 6), 3), ((5, 6), 2), ((4, 7), 2), ((7, 5), 3), ((5, 7), 2), ((1, 4), 2), ((4, 1), 2)],
)
def test_tokens_are_averaged_over_windows_of_equal_size(grid: tuple[int, int], factor: int) -> None:
    """Where the factor does not divide a side, the windows overlap, evenly spread from edge to edge."""
    torch.manual_seed(0)
    features = Features(torch.randn(2, 3), torch.randn(2, grid[0] * grid[1], 3), grid, torch.tensor([4, 1]))
    pooled = avg_pool_grid(features, factor)
    assert pooled.grid == (math.ceil(grid[0] / factor), math.ceil(grid[1] / factor))
    assert pooled.summary is features.summary and pooled.rows is features.rows
    maps, expected = features.to_map(), pooled.to_map()
    for i in range(pooled.grid[0]):
        for j in range(pooled.grid[1]):
            rows = slice(i * grid[0] // pooled.grid[0], math.ceil((i + 1) * grid[0] / pooled.grid[0]))
            columns = slice(j * grid[1] // pooled.grid[1], math.ceil((j + 1) * grid[1] / pooled.grid[1]))
            assert torch.allclose(expected[:, :, i, j], maps[:, :, rows, columns].mean((2, 3)), atol=1e-6)


def test_features_without_a_grid_are_not_averaged() -> None:
    summary = Features(torch.randn(2, 3), None)
    assert avg_pool_grid(summary, 2) is summary
    spatial = Features(None, torch.randn(2, 4, 3), (2, 2))
    assert avg_pool_grid(spatial, 1) is spatial


def test_factors_are_those_of_the_side_that_needs_more_or_has_less() -> None:
    grid = (4, 6)
    finer = {"wide": (4, 13), "high": (9, 6), "same": (4, 6), "coarser": (2, 3), "mixed": (2, 7)}
    assert upsample_factors(grid, finer) == {"wide": 3, "high": 3, "mixed": 2}
    coarser = {"half": (2, 3), "wide": (1, 3), "high": (2, 2), "same": (4, 6), "mixed": (1, 6), "odd": (2, 4)}
    assert downsample_factors(grid, coarser) == {"half": 2, "wide": 2, "high": 2}


def test_rows_are_scattered_into_zeros() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # (2, 1, 2)
    expected = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[1.0, 2.0]], [[0.0, 0.0]]])
    assert torch.equal(scatter_rows(x, 4, torch.tensor([2, 0])), expected)
    assert scatter_rows(x, 2, None) is x


def test_the_joint_latent_is_predicted_from_the_mean_of_the_teachers_of_each_image() -> None:
    """Teacher one has two taps and images 2 and 0; teacher two has all images; image 1 has none that takes part."""
    torch.manual_seed(0)
    rows, d = torch.tensor([2, 0]), 6
    dims = {"one/a": FeatureDims(3, None), "one/b": FeatureDims(4, None), "two/a": FeatureDims(5, None)}
    joint = JointToStudent(d, dims, 7)
    targets = {
        "one/a": Features(torch.randn(2, 3), None, rows=rows),
        "one/b": Features(torch.randn(2, 4), None, rows=rows),
        "two/a": Features(torch.randn(3, 5), None),
    }
    ones, two = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    output = joint(targets, (1, 1), {"one/a": ones, "one/b": ones, "two/a": two}).components()["summary"]

    def aligned(tap: str, row: int) -> torch.Tensor:
        name = f"taps.{tap.replace('/', '-')}.summary"
        return joint.get_parameter(f"{name}.weight") @ targets[tap].components()["summary"][row] + joint.get_parameter(
            f"{name}.bias"
        )

    one = {image: (aligned("one/a", row) + aligned("one/b", row)) / 2 for row, image in enumerate((2, 0))}
    means = [(one[0] + aligned("two/a", 0)) / 2, torch.zeros(d), one[2]]
    for image, mean in enumerate(means):
        hidden = F.gelu(joint.get_submodule("mlps.summary.0")(F.layer_norm(mean, (d,))))
        assert torch.allclose(output[image], joint.get_submodule("mlps.summary.2")(hidden), atol=1e-5)
