"""Any tap may be predicted on its own grid, also one that no kept head reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoulders.config.recipe import Recipe
from shoulders.errors import RecipeError
from shoulders.teachers import Tap
from shoulders.training.student import grid_factors
from tests.tiny import tiny_recipe

PATCH = 8  # the student of 32 px has a grid of 4 x 4
TAPS = {
    "own/fine": Tap(None, 6, (11, 11)),
    "own/other": Tap(None, 6, (11, 11)),
    "own/vector": Tap(6, None, (0, 0)),
    "second/fine": Tap(None, 6, (11, 11)),
}


def recipe(root: Path, **more: Any) -> Recipe:
    own = {"module": "mine:teacher", **more}
    return tiny_recipe(root, teachers={"own": own, "second": {"module": "mine:second"}})


def test_the_named_taps_are_predicted_on_their_own_grids(tmp_path: Path) -> None:
    assert grid_factors(recipe(tmp_path), TAPS, PATCH)["upsample"] == {}
    factors = grid_factors(recipe(tmp_path, match_grid=["fine"]), TAPS, PATCH)["upsample"]
    assert list(factors) == ["own/fine"] and factors["own/fine"] >= 2


@pytest.mark.parametrize("tap", ["vector", "unknown"])
def test_a_tap_without_a_grid_is_refused(tmp_path: Path, tap: str) -> None:
    with pytest.raises(RecipeError, match=rf"^teachers\.own\.match_grid: own/{tap} has no grid .*: fine, other$"):
        grid_factors(recipe(tmp_path, match_grid=[tap]), TAPS, PATCH)
