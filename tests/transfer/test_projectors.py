"""Projectors to a finer or coarser grid than the student's."""

from __future__ import annotations

import torch
from torch import nn

from shoulders.features import Features
from shoulders.transfer.projectors import (
    FeatureDims,
    JointToStudent,
    Projector,
    ProjectorMLP,
    TeacherToStudent,
    downsample_factors,
    upsample_factors,
)


def test_upsampled_tokens_are_those_of_torchs_pixel_shuffle() -> None:
    project = ProjectorMLP(5, ["block0", "latent"], 8, 3, upsample=2)
    x = {layer: torch.randn(2, 6, 5) for layer in ("block0", "latent")}
    summed = project.first["block0"](x["block0"]) + project.first["latent"](x["latent"])
    hidden = summed.view(2, 2, 3, 4, project.hidden)  # (B, H, W, u * u, hidden)
    maps = hidden.permute(0, 4, 3, 1, 2).flatten(1, 2)  # (B, hidden * u * u, H, W)
    shuffled = nn.functional.pixel_shuffle(maps, 2)  # (B, hidden, 2 H, 2 W)
    expected = project.last(nn.functional.gelu(shuffled.flatten(2).transpose(1, 2)))
    assert torch.allclose(project(x, (2, 3)), expected, atol=1e-6)


def test_the_hidden_width_is_divided_by_the_upsampling_factor() -> None:
    """So that the first matrix grows by the factor, not by its square."""
    for upsample, hidden in ((1, 24), (2, 12), (3, 8), (48, 1)):
        project = ProjectorMLP(5, ["latent"], 24, 3, upsample=upsample)
        assert project.hidden == project.last.in_features == hidden
        assert project.first["latent"].weight.shape == (hidden * upsample**2, 5)
    projector = Projector(6, FeatureDims(4, 3), ["latent"], 24, upsample=3)
    assert [projector.parts[name].hidden for name in ("summary", "spatial")] == [24, 8]  # a summary has no grid


def test_the_first_layer_alone_has_a_bias() -> None:
    first = ProjectorMLP(5, ["block0", "latent"], 8, 3).first
    assert [first[layer].bias is None for layer in ("block0", "latent")] == [False, True]


def test_a_coarser_tap_is_predicted_from_averaged_tokens() -> None:
    projector = Projector(6, FeatureDims(None, 3), ["latent"], 12, downsample=2)
    latent = Features(torch.randn(2, 6), torch.randn(2, 20, 6), (4, 5))
    output = projector({"latent": latent})
    assert output.summary is None and output.spatial is not None and output.grid == (2, 3)
    maps = latent.to_map()
    inner, edge = maps[:, :, 2:, 1:4].mean((2, 3)), maps[:, :, :2, 3:].mean((2, 3))  # of row 1, and of the last column
    mlp = projector.parts["spatial"]
    assert torch.allclose(output.spatial[:, 4], mlp({"latent": inner[:, None]}, (1, 1))[:, 0], atol=1e-6)
    assert torch.allclose(output.spatial[:, 2], mlp({"latent": edge[:, None]}, (1, 1))[:, 0], atol=1e-6)


def test_each_token_of_a_finer_grid_depends_on_one_token_of_the_student() -> None:
    projector = Projector(6, FeatureDims(4, 3), ["block0", "latent"], 12, upsample=3)
    features = {layer: Features(torch.randn(2, 6), torch.randn(2, 20, 6), (4, 5)) for layer in ("block0", "latent")}
    output = projector(features)
    assert output.grid == (12, 15) and output.spatial is not None and output.spatial.shape == (2, 180, 3)
    assert output.summary is not None and output.summary.shape == (2, 4)
    moved = dict(features)
    nudged = features["latent"].spatial.clone()  # type: ignore[union-attr]
    nudged[:, 7] += 1  # row 1, column 2
    moved["latent"] = Features(features["latent"].summary, nudged, (4, 5))
    changed = (projector(moved).spatial != output.spatial).any(-1)[0].view(12, 15)
    assert changed[3:6, 6:9].all() and changed.sum() == 9


def test_only_finer_grids_are_upsampled_and_only_coarser_ones_downsampled() -> None:
    grids = {"a/x": (12, 12), "a/y": (6, 6), "b/x": (24, 24), "b/y": (13, 12), "c/x": (3, 4)}
    assert upsample_factors((12, 12), grids) == {"b/x": 2, "b/y": 2}
    assert downsample_factors((12, 12), grids) == {"a/y": 2, "c/x": 3}


def test_rows_pass_through_every_projector() -> None:
    rows, dims = torch.tensor([0, 3]), FeatureDims(6, 6)
    features = Features(torch.randn(2, 6), torch.randn(2, 4, 6), (2, 2), rows)
    assert Projector(6, dims, ["latent"], 8, upsample=2)({"latent": features}).rows is rows
    assert Projector(6, dims, ["latent"], 8, downsample=2)({"latent": features}).rows is rows
    assert TeacherToStudent(6, {"one/x": dims}, 8)({"one/x": features}, (4, 4))["one/x"].rows is rows
    joint = JointToStudent(6, {"one/x": dims}, 8)({"one/x": features}, (4, 4), {"one/x": torch.ones(5)})
    assert joint.rows is None and joint.batch_size == 5
