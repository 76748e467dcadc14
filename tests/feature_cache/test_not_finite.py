"""Features that are not finite are not stored: their records are flagged, counted and named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoulders.config.recipe import Recipe, dump_recipe
from shoulders.distillation import distill
from shoulders.errors import NumericError
from shoulders.feature_cache import build_cache, open_cache, verify_cache
from shoulders.feature_cache.records import TRAILER_BYTES, pack, pixel_checksums
from shoulders.images import batches, open_images
from tests.feature_cache.toy import SINGLE_PROCESS, build, save_toy_world, teachers, toy_recipe, toy_spec
from tests.marked import mark_images, marked_teacher
from tests.tiny import metric_rows, run_cli, same_tensors, save_tiny_world, student_weights, tiny_recipe

MARKED = {"training": 2, "heldout": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world; two of its training images and one held-out image are bright."""
    root = save_toy_world(tmp_path_factory.mktemp("toy"))
    names = mark_images(toy_recipe(root, root / "cache"), **MARKED)
    (root / "names.json").write_text(json.dumps(sorted(names)))
    return root


def lenient(root: Path, cache: Path, **changes: Any) -> Recipe:
    return toy_recipe(root, cache, transfer={"preserve": 0.0, "max_not_finite": 0.2}, **changes)


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float16"), (math.inf, "int8")])
def test_the_builder_counts_what_is_not_finite(
    value: float, dtype: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = teachers() | {"own": marked_teacher(value)}
    recipe = lenient(root, tmp_path / "cache", images__views=2, cache__dtype=dtype)
    contents = build(recipe, own)["teachers"]
    names = json.loads((root / "names.json").read_text())
    views = {"own": 2 * MARKED["training"] + MARKED["heldout"]}
    assert {row["teacher"]: row["not_finite"] for row in contents} == {"large": 0, "small": 0} | views
    rows = [json.loads(line) for line in (tmp_path / "cache" / "not_finite.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == names and {row["teacher"] for row in rows} == {"own"}
    assert "teachers.own: its features are not finite for" in capsys.readouterr().err
    assert verify_cache(recipe, extra_teachers=own)["teachers"] == contents

    store = toy_spec(recipe, own).store("own")
    features, checksums, finite = store.features(np.arange(len(store.index)), torch.device("cpu"))
    assert (~finite).sum() == views["own"] and None not in checksums
    assert all(x.isfinite().all() for one in features.values() for x in one.components().values())
    records = store.records(np.arange(len(store.index))).numpy()[~finite]
    assert not records[:, :-TRAILER_BYTES].any()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    listed = run_cli("cache", tmp_path / "recipe.yaml", "--info").stdout
    assert "own: 40 views (5 of them without features: their features are not finite), complete" in listed


def test_a_teacher_that_is_never_finite_stops_a_build(root: Path, tmp_path: Path) -> None:
    own = {"own": marked_teacher(math.nan, everywhere=True)}
    with pytest.raises(
        NumericError, match="teachers.own: its features are finite for 0 of the first 16 views"
    ) as error:
        build(lenient(root, tmp_path / "cache"), own)
    assert error.value.exit_code == 4 and not list(tmp_path.rglob("*.bin"))


def test_a_build_stops_above_the_limit_and_continues_with_a_higher_one(root: Path, tmp_path: Path) -> None:
    own = {"own": marked_teacher(math.nan)}
    with pytest.raises(NumericError, match=r"for 2 of 24 images so far .* transfer.max_not_finite=0.05 allows"):
        build(toy_recipe(root, tmp_path / "cache"), own)
    assert not list(tmp_path.rglob("*.partial"))
    build(lenient(root, tmp_path / "cache"), own)
    assert len((tmp_path / "cache" / "not_finite.jsonl").read_text().splitlines()) == 3


def test_a_cached_run_masks_as_the_live_run_does(tmp_path: Path) -> None:
    world = save_tiny_world(tmp_path / "world")
    own = {"own": marked_teacher(math.nan)}

    def recipe(out: str, mode: str) -> Recipe:
        cache = {"path": str(tmp_path / "cache"), "dtype": "float32", "mode": mode}
        return tiny_recipe(world, tmp_path / out, images__views=2, cache=cache, train__steps=8)

    mark_images(recipe("live", "off"), **MARKED)
    distill(recipe("live", "off"), extra_teachers=own)
    build_cache(recipe("cached", "require"), extra_teachers=own)
    distill(recipe("cached", "require"), extra_teachers=own)
    live, cached = tmp_path / "live", tmp_path / "cached"
    assert same_tensors(student_weights(live), student_weights(cached))
    assert (live / "not_finite.jsonl").read_bytes() == (cached / "not_finite.jsonl").read_bytes()
    assert metric_rows(live, "evaluation") == metric_rows(cached, "evaluation")


def test_features_of_the_base_that_are_not_finite_stay_so(tmp_path: Path) -> None:
    """The student contains the base: it is not finite for the same images, and the step is skipped."""
    save_toy_world(tmp_path)
    recipe = toy_recipe(tmp_path, tmp_path / "cache", transfer={"preserve": 1.0}, cache__dtype="float32")
    build(recipe)
    spec = toy_spec(recipe)
    store = spec.store("base")
    batch = next(batches(spec.images, [(16, 16)], recipe.images, batch=4, seed=0, steps=1, decode_sizes=spec.sizes))
    (number,) = store.index.records_of(batch.take(slice(1, 2)))
    record = store.records(np.array([number])).numpy()
    payload, keys = np.zeros_like(record[:, :-TRAILER_BYTES]), store.index.keys(np.array([number]))
    flagged = pack(payload, pixel_checksums(record), keys, store.salt, {0})
    ((shard, position),) = store.shards.locate(np.array([number]))
    with store.shards.path(shard).open("r+b") as file:
        file.seek(position * store.shards.record_bytes)
        file.write(flagged.tobytes())
    cached = open_cache(recipe, teachers(), open_images(recipe.images, recipe.train.seed), False, SINGLE_PROCESS)
    assert cached is not None
    latent = cached(batch)["base/latent"]
    assert latent.rows is None and latent.summary is not None
    assert latent.summary.isnan().all(1).tolist() == [False, True, False, False]
