"""Ranks with different recipes, images, weights or caches are refused, and the first difference is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.distillation import prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.feature_cache import build_cache
from shoulders.training.agreement import check_same_inputs, check_same_recipe
from tests.tiny import save_base, save_convnext, save_tiny_world, tiny_recipe

SINGLE_PROCESS = DistContext(0, 1, torch.device("cpu"))


def check_ranks(*checks: Callable[[DistContext], None]) -> None:
    """Run the check of each rank; the last one gathers the values of all."""
    sent: list[object] = []

    class Rank(DistContext):
        def gather(self, value: object) -> list:
            sent.append(value)
            return list(sent)

    for rank, check in enumerate(checks):
        check(Rank(rank, len(checks), torch.device("cpu")))


def recipe_check(world: Path, resume: bool = False, **changes: Any) -> Callable[[DistContext], None]:
    recipe = tiny_recipe(world, **changes)
    return lambda dist: check_same_recipe(recipe, [], resume, dist)


def inputs_check(world: Path, **changes: Any) -> Callable[[DistContext], None]:
    trainer = prepare(tiny_recipe(world, **changes), {}, SINGLE_PROCESS)
    return lambda dist: check_same_inputs(trainer.teachers, trainer.student, trainer.images, dist)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__lr": 0.01}, r"train.lr: differs between ranks 0 and 2 \(0.005 and 0.01\); start every rank with"),
        ({"train__seed": 5}, "train.seed: .*0 and 5"),
        ({"train__steps": 6}, "train.steps: .*4 and 6"),
        ({"images__size": 64}, "images.size: .*32 and 64"),
        ({"cache__path": "a"}, "cache.path: .*None and 'a'"),
        ({"teachers__segmenter": None}, "teachers.segmenter.model: .* and 'nothing'"),
        ({"resume": True}, "--resume: .*False and True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_recipe_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        check_ranks(recipe_check(tmp_path), recipe_check(tmp_path), recipe_check(tmp_path, **changes))


def test_the_order_of_teachers_counts(tmp_path: Path) -> None:
    teachers = tiny_recipe(tmp_path).model_dump()["teachers"]
    changed = recipe_check(tmp_path, teachers=dict(reversed(teachers.items())))
    with pytest.raises(RecipeError, match="order of teachers: differs"):
        check_ranks(recipe_check(tmp_path), changed)


def test_the_number_of_workers_may_differ(tmp_path: Path) -> None:
    check_ranks(recipe_check(tmp_path), recipe_check(tmp_path, images__workers=3))


def rename_image(world: Path) -> None:
    (world / "images" / "0019.jpg").rename(world / "images" / "0020.jpg")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (rename_image, "images"),
        (lambda world: save_convnext(world / "classifier", seed=9), "teachers.classifier"),
        (lambda world: save_base(world / "base", "dinov2_with_registers"), "student.base"),
    ],
    ids=["images", "teacher", "base"],
)
def test_other_files_are_refused(change: Callable[[Path], object], key: str, tmp_path: Path) -> None:
    world = save_tiny_world(tmp_path, images=20)
    checks = [inputs_check(world), inputs_check(world)]
    check_ranks(*checks)
    change(world)
    with pytest.raises(RecipeError, match=f"^{key}: differs between ranks 0 and 2; give every rank the same files$"):
        check_ranks(*checks, inputs_check(world))


def test_another_cache_and_another_precision_are_refused(tmp_path: Path) -> None:
    world = save_tiny_world(tmp_path, images=20)
    for dtype in ("float32", "float16"):
        build_cache(tiny_recipe(world, cache={"path": str(tmp_path / dtype), "dtype": dtype}, images__views=1))
    one, other = (
        inputs_check(world, cache={"path": str(tmp_path / dtype), "dtype": dtype, "mode": "require"}, images__views=1)
        for dtype in ("float32", "float16")
    )
    check_ranks(one, one)
    with pytest.raises(RecipeError, match="^cache.path: differs between ranks 0 and 1; give every rank the same files"):
        check_ranks(one, other)
    with pytest.raises(RecipeError, match=r"^train.precision: differs between ranks 0 and 1 \(False and True\)"):
        check_ranks(inputs_check(world), inputs_check(world, train__precision="bf16"))
