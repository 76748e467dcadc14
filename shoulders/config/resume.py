"""The recipe of a resumed run must be the one that it started with, except for some keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoulders.config.recipe import Recipe, read_recipe
from shoulders.errors import RecipeError

# keys that may change when a run is resumed: they change no weight
FREE_ON_RESUME = (
    "out",
    "images.workers",
    "images.max_unreadable",
    "transfer.max_not_finite",
    "train.log_every",
    "train.save_every",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.parallel",
    "cache.path",
    "cache.mode",
)


def check_resumed(recipe: Recipe, started_with: Path) -> None:
    """Compare the recipe of a resumed run with the one that the run started with.

    Args:
        recipe: the recipe now.
        started_with: the recipe file in the run folder.

    Raises:
        RecipeError: naming the first key that differs and would change the result.
    """
    started = read_recipe(started_with)
    before, now = flatten(started.model_dump(mode="json")), flatten(recipe.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new and key not in FREE_ON_RESUME:
            raise RecipeError(
                f"{key}: the run started with {old!r}, not {new!r}; resume with the same, or choose another out"
            )
    _check_order("images.sources", list(started.images.sources), list(recipe.images.sources))
    _check_order("teachers", list(started.teachers), list(recipe.teachers))


def _check_order(key: str, before: list[str], now: list[str]) -> None:
    if before != now:
        raise RecipeError(f"{key}: the run started with {', '.join(before)} in this order; resume with the same")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
