"""Runs over the tiny world: what tests of a run interrupt, resume and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill
from tests.tiny import tiny_tree

STEPS = 12
TRAIN = {"steps": STEPS, "save_every": 4, "evaluate_every": 6, "ema": 0.9}

SHORT: dict[str, Any] = {
    "train__steps": 4,
    "train__save_every": 2,
    "train__evaluate_every": 4,
    "train__keep_checkpoints": 1,
}


def run_tree(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The recipe of a run as plain data; ``changes`` as in `tiny_tree`."""
    return tiny_tree(world, out, **{f"train__{key}": value for key, value in TRAIN.items()} | changes)


def run(world: Path, out: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Distil a student into the folder ``out``; returns the summary."""
    return distill(check_recipe(run_tree(world, out, **changes)), resume=resume)
