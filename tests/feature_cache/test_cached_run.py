"""A run that reads the cache gives the same student as a run without it, and loads no teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.config.recipe import Recipe
from shoulders.distillation import distill
from shoulders.errors import DataError, RecipeError
from shoulders.feature_cache import build_cache, info_cache, open_cache
from shoulders.feature_cache.shard_files import MAX_OPEN_FILES
from shoulders.features import Batch, Features
from shoulders.images import batches, evaluation_batches, open_images
from shoulders.student.encoder import Encoder
from shoulders.teachers import Teachers, load_teacher
from shoulders.training.checkpoint import checkpoints
from shoulders.training.step import TrainStep
from tests.feature_cache.toy import SINGLE_PROCESS
from tests.tiny import (
    metric_rows,
    same_tensors,
    save_base,
    save_convnext,
    save_images,
    save_segformer,
    student_weights,
    tiny_recipe,
)

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, and JPEG files so large that the largest size decides how they are decoded."""
    root = tmp_path_factory.mktemp("world")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((480, 400)).save(root / "images" / f"{i:03d}.jpg")
    for dtype in ("float32", "float16"):
        build_cache(recipe(root, dtype, "unused"))
    return root


def recipe(world: Path, dtype: str, out: str, mode: str = "require", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "teachers__classifier": {"model": str(world / "classifier"), "size": 64},
        "images__views": 2,
        "train__steps": STEPS,
        "train__lr": 1e-3,
        "train__save_every": 4,
        "train__evaluate_every": 8,
        "cache": {"path": str(world / dtype), "dtype": dtype, "mode": mode},
    }
    return tiny_recipe(world, f"runs/{out}", **settings | changes)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metric_rows(out)]


@pytest.fixture
def no_teacher_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a teacher was loaded")

    for place in ("shoulders.distillation.load_teacher", "shoulders.feature_cache.read.load_teacher"):
        monkeypatch.setattr(place, refuse)


def rounded(features: dict[str, Features]) -> dict[str, Features]:
    return {tap: one.map(lambda x: x.half().float()) for tap, one in features.items()}


@pytest.mark.parametrize(("dtype", "live"), [("float32", lambda features: features), ("float16", rounded)])
def test_the_student_is_the_same_bit_for_bit(
    dtype: str,
    live: Callable[[dict[str, Features]], dict[str, Features]],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_teacher_loads: None,
) -> None:
    cached = recipe(world, dtype, f"{dtype}-cached")
    summary = distill(cached)
    monkeypatch.undo()
    original = TrainStep.teacher_features
    monkeypatch.setattr(TrainStep, "teacher_features", lambda self, batch: live(original(self, batch)))
    live_summary = distill(recipe(world, dtype, f"{dtype}-live", mode="off"))
    assert losses(cached.out) == losses(world / "runs" / f"{dtype}-live")
    assert same_tensors(student_weights(cached.out), student_weights(world / "runs" / f"{dtype}-live"))
    for name in summary:
        assert not name.startswith("fvu") or summary[name] == live_summary[name]
    assert any(name.startswith("fvu/") for name in summary)


def test_the_features_of_the_base_for_a_side_adapter_are_read_from_the_cache(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {"base": str(world / "base"), "adapter": {"kind": "side", "width": 32, "blocks": 2}}
    cached = recipe(world, "float32", "side-cached", student=student)
    with pytest.raises(DataError, match="base.latent.block0: there is no cache of this teacher"):
        distill(cached)
    before = {path: path.stat().st_ino for path in (world / "float32").rglob("*.bin")}
    build_cache(cached)
    assert before == {path: path.stat().st_ino for path in before}  # all students share the teachers of a cache
    distill(recipe(world, "float32", "side-live", mode="off", student=student))
    monkeypatch.setattr(Encoder, "base_features", lambda *args: pytest.fail("the base ran"))
    distill(cached)
    assert same_tensors(student_weights(cached.out), student_weights(world / "runs" / "side-live"))


def test_cached_features_are_those_of_the_teachers(world: Path) -> None:
    checked = recipe(world, "float32", "unused")
    images = open_images(checked.images, checked.train.seed)
    cached = open_cache(checked, {}, images, False, SINGLE_PROCESS)
    assert cached is not None
    live = Teachers({name: load_teacher(name, spec) for name, spec in checked.teachers.items()})
    assert cached.taps == live.taps and cached.provenance() == live.provenance()
    assert sum(store.shards.max_open for store in cached.stores.values()) <= MAX_OPEN_FILES
    sizes = [(32, 32), (64, 64)]
    training = list(batches(images, sizes, checked.images, batch=8, seed=0, steps=7))  # more than two epochs
    assert {int(view) for batch in training for view in batch.views} == {0, 1}  # type: ignore[union-attr]
    heldout = list(evaluation_batches(images.collection, sizes, 8, images.heldout))
    for batch in training + heldout:
        read, computed = cached(batch), live(batch)
        assert read.keys() == {*computed, "base/latent"}
        for tap, features in computed.items():
            for component, x in features.components().items():
                assert (read[tap].components()[component] - x).abs().max() == 0


def test_int8_gives_the_same_fvu_within_one_percent(world: Path) -> None:
    many = {"path": str(save_images(world / "many", 640)), "size": 32, "views": 1, "workers": 0}
    build_cache(recipe(world, "int8", "unused", images=many))
    cached = distill(recipe(world, "int8", "int8-cached", images=many))
    live = distill(recipe(world, "int8", "int8-live", mode="off", images=many))
    fvu = {
        f"fvu/{row['teacher']}/{tap['tap']}/{tap['component']}": tap["reconstruction_fvu"]
        for row in info_cache(recipe(world, "int8", "unused"))["teachers"]
        for tap in row["taps"]
    }
    assert len(fvu) == 6 and max(fvu.values()) < 1e-3
    for name in fvu:  # that of the random base is nearly zero, where one percent is less than rounding
        assert cached[name] == pytest.approx(live[name], rel=0.01, abs=5e-4), name


def test_a_run_resumes_only_with_the_same_cache(world: Path) -> None:
    expected = distill(recipe(world, "float16", "whole"))
    out = world / "runs" / "stopped"
    shutil.copytree(world / "runs" / "whole", out)
    shutil.rmtree(out / "student")
    shutil.rmtree(checkpoints(out / "checkpoints")[-1])
    text = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(text.replace("runs/whole", "runs/stopped"))
    with pytest.raises(DataError, match=r"cached \(cache.mode\) is not the same as when this run started"):
        distill(recipe(world, "float16", "stopped", mode="off"), resume=True)
    shutil.copytree(world / "float16", world / "moved", dirs_exist_ok=True)
    moved = recipe(world, "float16", "stopped", cache={"path": str(world / "moved"), "dtype": "float16"})
    resumed = distill(moved, resume=True)
    assert same_tensors(student_weights(out), student_weights(world / "runs" / "whole"))
    assert resumed["fvu_spread"] == expected["fvu_spread"]


def test_a_batch_without_known_views_is_refused(world: Path) -> None:
    checked = recipe(world, "float16", "unused")
    images = open_images(checked.images, 0)
    cached = open_cache(checked, {}, images, False, SINGLE_PROCESS)
    assert cached is not None
    batch = next(batches(images, [(32, 32)], checked.images, batch=8, seed=0, steps=1, decode_sizes=[(64, 64)]))
    assert batch.views is not None
    assert [len(part.views) for part in batch.split(5)] == [5, 3]  # type: ignore[arg-type]
    parts = [cached(part)["segmenter/stage1"].components()["spatial"] for part in batch.split(5)]
    assert torch.equal(torch.cat(parts), cached(batch)["segmenter/stage1"].components()["spatial"])
    with pytest.raises(DataError, match="does not record the numbers of its views"):
        cached(Batch(batch.ids, batch.rendered))
    with pytest.raises(DataError, match="view 2 is needed, but the cache has 2 views of each image"):
        cached(Batch(batch.ids, batch.rendered, views=batch.views + 2))
    with pytest.raises(DataError, match="an image is needed that is not in the cache"):
        cached(Batch(batch.ids + 1, batch.rendered, views=batch.views))
    assert cached["segmenter"].taps == load_teacher("segmenter", checked.teachers["segmenter"]).taps


def test_recipes_that_require_an_impossible_cache_are_refused(world: Path) -> None:
    fresh = {"path": str(world / "images"), "size": 32}
    with pytest.raises(RecipeError, match="cache.mode: require, but images.views is fresh: .* such as images.views=4"):
        distill(recipe(world, "float16", "refused", images=fresh))
    with pytest.raises(RecipeError, match="cache.mode: require, but cache.path is not given"):
        distill(recipe(world, "float16", "refused", cache={"mode": "require"}))
    assert not (world / "runs" / "refused").exists()
    with pytest.raises(DataError, match="there is no cache of this teacher; build it with: shoulders cache RECIPE"):
        distill(recipe(world, "float16", "refused", cache={"mode": "require", "path": str(world / "nowhere")}))
