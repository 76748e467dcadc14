"""Checks before a run: what cannot work is refused with one line, before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import shoulders
from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill
from shoulders.errors import DataError, RecipeError
from shoulders.features import Features
from shoulders.planning import plan
from shoulders.storage.locks import RUN_LOCK, FileLocks
from tests.runs import run, run_tree
from tests.tiny import Colours, save_images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images__path": "nowhere"}, "images: nowhere .images. does not exist"),
        ({"train__batch": 9, "train__accumulate": 2}, "train.batch: 9 cannot be divided .* multiple of 2"),
        ({"images__size": 30}, r"images.size: .*30.* nearest"),
        ({"teachers": {}}, "teachers: none"),
        ({"transfer__layers": ["block0"], "transfer__t2s": "none"}, "no gradient reaches the last block"),
        ({"transfer__layers": ["block0", "block7"]}, "has no layer 'block7'"),
        ({"images__scale": [0, 1]}, "images: scale: fractions"),
        ({"train__betas": [2, 0.9]}, "train.betas"),
        ({"out": "/dev/null/run"}, "out: cannot write to /dev/null"),
    ],
    ids=["images", "batch", "size", "teachers", "layers", "unknown layer", "scale", "betas", "out"],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_loads(
    changes: dict[str, Any], message: str, tiny_world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as refusal:
        run(tiny_world, **({"out": tmp_path / "run"} | changes))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_another_recipe(
    tiny_world: Path, uninterrupted_run: Path
) -> None:
    with pytest.raises(RecipeError, match="add --resume, or choose another out"):
        run(tiny_world, uninterrupted_run)
    with pytest.raises(RecipeError, match=r"train.lr: the run started with 0.005, not 0.01"):
        run(tiny_world, uninterrupted_run, resume=True, train__lr=0.01)


def test_a_folder_is_used_by_one_run_at_a_time(tiny_world: Path, tmp_path: Path) -> None:
    with FileLocks(tmp_path / "run").claim(RUN_LOCK):
        with pytest.raises(RecipeError, match=rf"out: .* is in use by process {os.getpid()} on .*; wait for it"):
            run(tiny_world, tmp_path / "run")
        assert not (tmp_path / "run" / "recipe.yaml").exists()
    run(tiny_world, tmp_path / "run", train__steps=1)
    assert not list((tmp_path / "run").glob(".run*"))


@pytest.mark.parametrize("name", ["base", "student", "my.net", "classifier"])
def test_an_extra_teacher_with_a_reserved_or_used_name_is_refused(name: str, tiny_world: Path, tmp_path: Path) -> None:
    extra_teachers = {name: shoulders.Teacher(Colours(), size=(32, 32))}
    with pytest.raises(RecipeError, match="rename one|teacher name"):
        distill(check_recipe(run_tree(tiny_world, tmp_path / "run")), extra_teachers=extra_teachers)


def test_taps_with_the_same_submodule_name_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    class Twins(Colours):
        def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
            (features,) = super().forward(pixels).values()
            return {"a.b": features, "a_b": features}

    with pytest.raises(RecipeError, match=r"type/a.b, type/a_b: these names differ by a point"):
        distill(
            check_recipe(run_tree(tiny_world, tmp_path / "run")),
            extra_teachers={"type": shoulders.Teacher(Twins(), size=(32, 32))},
        )


def test_too_few_held_out_images_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    few = save_images(tmp_path / "few", 6)
    with pytest.raises(DataError, match=r"images: .* 3 held-out images, and 4 are needed; give more images"):
        run(tiny_world, tmp_path / "run", images__path=str(few), images__holdout=8)
    with pytest.raises(DataError, match=r"classifier learns from 3 of 3 held-out images"):
        plan(check_recipe(run_tree(tiny_world, tmp_path / "run", images__path=str(few), images__holdout=8)))
