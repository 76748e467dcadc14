"""Projectors that answer on a finer grid than the student's, or a coarser."""

from __future__ import annotations

import torch
from torch import nn

from shoulders.features import Features
from shoulders.transfer.projectors import FeatureDims, Projector, ProjectorMLP, coarser, finer


def test_places_come_out_row_by_row_of_the_finer_grid() -> None:
    """Against torch's own pixel shuffle, on a grid that is not square."""
    rungs = ProjectorMLP(5, ["block0", "latent"], 8, 3, fine=2)
    x = {place: torch.randn(2, 6, 5) for place in ("block0", "latent")}
    summed = rungs.first["block0"](x["block0"]) + rungs.first["latent"](x["latent"])
    hidden = summed.view(2, 2, 3, 4, rungs.hidden)  # (B, H, W, f * f, hidden)
    maps = hidden.permute(0, 4, 3, 1, 2).flatten(1, 2)  # (B, hidden * f * f, H, W)
    shuffled = nn.functional.pixel_shuffle(maps, 2)  # (B, hidden, 2 H, 2 W)
    truth = rungs.last(nn.functional.gelu(shuffled.flatten(2).transpose(1, 2)))
    assert torch.allclose(rungs(x, (2, 3)), truth, atol=1e-6)


def test_a_coarse_tap_is_told_of_averaged_places() -> None:
    projector = Projector(6, FeatureDims(None, 3), ["latent"], 12, coarse=2)
    seen = Features(torch.randn(2, 6), torch.randn(2, 20, 6), (4, 5))
    told = projector({"latent": seen})
    assert told.summary is None and told.spatial is not None and told.grid == (2, 3)
    maps = seen.to_map()
    whole, edge = maps[:, :, 2:, 1:4].mean((2, 3)), maps[:, :, :2, 3:].mean((2, 3))  # of row 1, and of the last column
    mlp = projector.parts["spatial"]
    assert torch.allclose(told.spatial[:, 4], mlp({"latent": whole[:, None]}, (1, 1))[:, 0], atol=1e-6)
    assert torch.allclose(told.spatial[:, 2], mlp({"latent": edge[:, None]}, (1, 1))[:, 0], atol=1e-6)


def test_a_projector_tells_of_the_finer_grid_and_of_the_summary_as_before() -> None:
    projector = Projector(6, FeatureDims(4, 3), ["block0", "latent"], 12, fine=3)
    seen = {place: Features(torch.randn(2, 6), torch.randn(2, 20, 6), (4, 5)) for place in ("block0", "latent")}
    told = projector(seen)
    assert told.grid == (12, 15) and told.spatial is not None and told.spatial.shape == (2, 180, 3)
    assert told.summary is not None and told.summary.shape == (2, 4)
    # what one place says of its own nine depends on no other place
    moved = dict(seen)
    nudged = seen["latent"].spatial.clone()  # type: ignore[union-attr]
    nudged[:, 7] += 1  # row 1, column 2
    moved["latent"] = Features(seen["latent"].summary, nudged, (4, 5))
    changed = (projector(moved).spatial != told.spatial).any(-1)[0].view(12, 15)
    assert changed[3:6, 6:9].all() and changed.sum() == 9


def test_only_finer_grids_need_a_finer_projector() -> None:
    grids = {"a/x": (12, 12), "a/y": (6, 6), "b/x": (24, 24), "b/y": (13, 12)}
    assert finer((12, 12), grids) == {"b/x": 2, "b/y": 2}
    assert coarser((12, 12), {**grids, "c/x": (3, 4)}) == {"a/y": 2, "c/x": 3}
