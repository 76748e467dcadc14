"""A run out of the cache is the live run, bit for bit, and loads no teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distillation import Run, distill
from shoulders.errors import DataError, RecipeError
from shoulders.feature_cache import build_cache, info_cache, open_cache, store
from shoulders.features import Batch, Features
from shoulders.images import batches, evaluation_batches, open_images
from shoulders.student.encoder import Encoder
from shoulders.teachers import Teachers, load_teacher
from shoulders.training.checkpoint import checkpoints
from tests.feature_cache.toy import HERE
from tests.tiny import save_base, save_convnext, save_images, save_segformer

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, and JPEGs so large that the largest size asked for decides how they are decoded."""
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
    tree: dict[str, Any] = {
        "student": {"base": str(world / "base"), "adapter": {"kind": "bottleneck", "width": 8}},
        "teachers": {
            "classifier": {"model": str(world / "classifier"), "size": 64},
            "segmenter": {"model": str(world / "segmenter"), "taps": ["stage0", "stage1"]},
        },
        "images": {"path": str(world / "images"), "size": 32, "views": 2, "holdout": 12, "workers": 0},
        "transfer": {"calibration_images": 16},
        "train": {
            "steps": STEPS,
            "batch": 8,
            "lr": 1e-3,
            "precision": "fp32",
            "log_every": 1,
            "save_every": 4,
            "evaluate_every": 8,
        },
        "cache": {"path": str(world / dtype), "dtype": dtype, "mode": mode},
        "out": str(world / "runs" / out),
    }
    return check_recipe(tree | changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture
def no_teacher_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a teacher was loaded")

    for place in ("shoulders.distillation.load_teacher", "shoulders.feature_cache.read.load_teacher"):
        monkeypatch.setattr(place, refuse)


def rounded(told: dict[str, Features]) -> dict[str, Features]:
    return {tap: features.map(lambda x: x.half().float()) for tap, features in told.items()}


@pytest.mark.parametrize(("dtype", "live"), [("float32", lambda told: told), ("float16", rounded)])
def test_the_student_is_that_of_the_live_run_bit_for_bit(
    dtype: str,
    live: Callable[[dict[str, Features]], dict[str, Features]],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_teacher_loads: None,
) -> None:
    cached = recipe(world, dtype, f"{dtype}-cached")
    summary = distill(cached)
    monkeypatch.undo()
    teach = Run.teach
    monkeypatch.setattr(Run, "teach", lambda self, batch: live(teach(self, batch)))
    told = distill(recipe(world, dtype, f"{dtype}-live", mode="off"))
    assert losses(cached.out) == losses(world / "runs" / f"{dtype}-live")
    assert same(weights(cached.out), weights(world / "runs" / f"{dtype}-live"))
    assert {name: told[name] for name in told if name.startswith("fvu")} == {
        name: summary[name] for name in summary if name.startswith("fvu")
    }


def test_an_adapter_beside_the_base_reads_the_base_out_of_the_cache(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"base": str(world / "base"), "adapter": {"kind": "side", "width": 32, "blocks": 2}}
    cached = recipe(world, "float32", "side-cached", student=beside)
    with pytest.raises(DataError, match="base.latent.block0: no cache of this teacher is here"):
        distill(cached)
    before = {path: path.stat().st_ino for path in (world / "float32").rglob("*.bin")}
    build_cache(cached)
    assert before == {path: path.stat().st_ino for path in before}  # the teachers are those of any student
    distill(recipe(world, "float32", "side-live", mode="off", student=beside))
    monkeypatch.setattr(Encoder, "base_features", lambda *args: pytest.fail("the base was asked"))
    distill(cached)
    assert same(weights(cached.out), weights(world / "runs" / "side-live"))


def test_features_are_those_of_live_teachers(world: Path) -> None:
    asked = recipe(world, "float32", "unused")
    images = open_images(asked.images, asked.train.seed)
    cached = open_cache(asked, {}, images, False, HERE)
    assert cached is not None
    live = Teachers({name: load_teacher(name, spec) for name, spec in asked.teachers.items()})
    assert cached.taps == live.taps and cached.provenance() == live.provenance()
    assert sum(shelf.shards.most for shelf in cached.stores.values()) <= store.MOST_OPEN
    sizes = [(32, 32), (64, 64)]
    training = list(batches(images, sizes, asked.images, batch=8, seed=0, steps=7))  # the second epoch and the third
    assert {int(view) for batch in training for view in batch.views} == {0, 1}  # type: ignore[union-attr]
    heldout = list(evaluation_batches(images.collection, sizes, 8, images.heldout))
    for batch in training + heldout:
        read, told = cached(batch), live(batch)
        assert read.keys() == {*told, "base/latent"}
        for tap, features in told.items():
            for part, x in features.components().items():
                assert (read[tap].components()[part] - x).abs().max() == 0


def test_int8_inherits_as_much_as_live_within_a_hundredth(world: Path) -> None:
    many = {"path": str(save_images(world / "many", 640)), "size": 32, "views": 1, "workers": 0}
    build_cache(recipe(world, "int8", "unused", images=many))
    cached = distill(recipe(world, "int8", "int8-cached", images=many))
    live = distill(recipe(world, "int8", "int8-live", mode="off", images=many))
    lost = {
        f"fvu/{row['teacher']}/{tap['tap']}/{tap['part']}": tap["reconstruction_fvu"]
        for row in info_cache(recipe(world, "int8", "unused"))["teachers"]
        for tap in row["taps"]
    }
    assert len(lost) == 6 and max(lost.values()) < 1e-3
    for name in lost:  # the random base is inherited nearly whole: a hundredth of nothing is less than rounding
        assert cached[name] == pytest.approx(live[name], rel=0.01, abs=5e-4), name


def test_it_goes_on_from_a_checkpoint_out_of_the_same_cache_only(world: Path) -> None:
    whole = distill(recipe(world, "float16", "whole"))
    out = world / "runs" / "stopped"
    shutil.copytree(world / "runs" / "whole", out)
    shutil.rmtree(out / "student")
    shutil.rmtree(checkpoints(out / "checkpoints")[-1])
    written = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(written.replace("runs/whole", "runs/stopped"))
    with pytest.raises(DataError, match=r"out of a cache \(cache.mode\) is not as when this run began"):
        distill(recipe(world, "float16", "stopped", mode="off"), resume=True)
    shutil.copytree(world / "float16", world / "moved", dirs_exist_ok=True)
    moved = recipe(world, "float16", "stopped", cache={"path": str(world / "moved"), "dtype": "float16"})
    again = distill(moved, resume=True)
    assert same(weights(out), weights(world / "runs" / "whole"))
    assert again["fvu_spread"] == whole["fvu_spread"]


def test_a_batch_says_which_views_it_holds(world: Path) -> None:
    asked = recipe(world, "float16", "unused")
    images = open_images(asked.images, 0)
    cached = open_cache(asked, {}, images, False, HERE)
    assert cached is not None
    batch = next(batches(images, [(32, 32)], asked.images, batch=8, seed=0, steps=1, decode_sizes=[(64, 64)]))
    assert batch.views is not None
    assert [len(part.views) for part in batch.split(5)] == [5, 3]  # type: ignore[arg-type]
    parts = [cached(part)["segmenter/stage1"].components()["spatial"] for part in batch.split(5)]
    assert torch.equal(torch.cat(parts), cached(batch)["segmenter/stage1"].components()["spatial"])
    with pytest.raises(DataError, match="does not say which views"):
        cached(Batch(batch.ids, batch.rendered))
    with pytest.raises(DataError, match="asked for view 2, but only 2 of each image"):
        cached(Batch(batch.ids, batch.rendered, views=batch.views + 2))
    with pytest.raises(DataError, match="not among those it was made of"):
        cached(Batch(batch.ids + 1, batch.rendered, views=batch.views))
    assert cached["segmenter"].taps == load_teacher("segmenter", asked.teachers["segmenter"]).taps


def test_recipes_that_insist_on_a_cache_that_cannot_be_are_refused(world: Path) -> None:
    fresh = {"path": str(world / "images"), "size": 32}
    with pytest.raises(RecipeError, match="cache.mode: require, but images.views is fresh: .* such as images.views=4"):
        distill(recipe(world, "float16", "refused", images=fresh))
    with pytest.raises(RecipeError, match="cache.mode: require, but cache.path is not given"):
        distill(recipe(world, "float16", "refused", cache={"mode": "require"}))
    assert not (world / "runs" / "refused").exists()
    with pytest.raises(DataError, match="no cache of this teacher is here; make it with: shoulders cache RECIPE"):
        distill(recipe(world, "float16", "refused", cache={"mode": "require", "path": str(world / "nowhere")}))
