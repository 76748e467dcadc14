"""Bring spatial features of different grids onto one."""

from __future__ import annotations

import torch.nn.functional as F

from shoulders.features import Features


def align(features: Features, grid: tuple[int, int]) -> Features:
    """The same Features with the spatial part resized bilinearly (antialiased where it shrinks) to ``grid``."""
    if features.spatial is None or features.grid == grid:
        return features
    resized = F.interpolate(features.to_map(), size=grid, mode="bilinear", antialias=True, align_corners=False)
    return Features.from_map(resized, features.summary)


def align_pair(one: Features, other: Features) -> tuple[Features, Features]:
    """Both on the smaller of their two grids (fewer places)."""
    places = [f.grid[0] * f.grid[1] for f in (one, other)]
    grid = one.grid if places[0] <= places[1] else other.grid
    return align(one, grid), align(other, grid)
