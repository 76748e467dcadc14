"""Projectors that answer on a finer grid than the student's."""

from __future__ import annotations

import torch
from torch import nn

from shoulders.features import Features
from shoulders.transfer.projectors import Finer, Projector, Widths, finer


def test_places_come_out_row_by_row_of_the_finer_grid() -> None:
    """Against torch's own pixel shuffle, on a grid that is not square."""
    rung = Finer(5, 8, 3, factor=2)
    x = torch.randn(2, 6, 5)
    hidden = rung.first(x).view(2, 2, 3, 4, rung.hidden)  # (B, H, W, f * f, hidden)
    maps = hidden.permute(0, 4, 3, 1, 2).flatten(1, 2)  # (B, hidden * f * f, H, W)
    shuffled = nn.functional.pixel_shuffle(maps, 2)  # (B, hidden, 2 H, 2 W)
    truth = rung.last(nn.functional.gelu(shuffled.flatten(2).transpose(1, 2)))
    assert torch.allclose(rung(x, (2, 3)), truth, atol=1e-6)


def test_a_projector_tells_of_the_finer_grid_and_of_the_summary_as_before() -> None:
    projector = Projector(6, Widths(4, 3), ["block0", "latent"], 12, fine=3)
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
