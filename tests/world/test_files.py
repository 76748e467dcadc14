"""The world on disk: common formats, the same bytes every time, complete or absent."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from shoulders.errors import RecipeError
from shoulders.images import ImageSource, call_source
from shoulders.images.run_lengths import mask_to_runs
from shoulders.tasks.data.labelled import find_labelled
from shoulders.world import CLASSES, draw, split_seed, unlabelled, write_world

COUNTS = {"train": 60, "val": 50, "test": 55}


def digest(folder: Path) -> str:
    """A hash of the names and contents of all files."""
    contents = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        contents.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return contents.hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, ["neon"], COUNTS)
    return folder


def test_the_same_seed_writes_the_same_files_bit_for_bit(world: Path, tmp_path: Path) -> None:
    code = f"from shoulders.world import write_world; write_world({str(tmp_path / 'w')!r}, ['neon'], {COUNTS})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert digest(tmp_path / "w" / "neon") == digest(world / "neon")
    write_world(tmp_path / "other", ["neon"], COUNTS, seed=1)
    assert digest(tmp_path / "other" / "neon") != digest(world / "neon")


def test_class_folders_have_each_scene_under_its_label(world: Path) -> None:
    splits = find_labelled(world / "neon" / "classification")
    assert (len(splits.train.indices), len(splits.test.indices), splits.n_classes) == (60, 55, 10)
    assert splits.train.images.classes == sorted(CLASSES)
    for path in (world / "neon" / "classification" / "test").rglob("*.png"):
        scene = draw("neon", split_seed("test"), int(path.stem))
        assert path.parent.name == CLASSES[scene.label]
        assert (np.asarray(Image.open(path)) == scene.image).all()


def test_semantic_masks_are_those_of_their_scenes(world: Path) -> None:
    folder = world / "neon" / "semantic"
    assert json.loads((folder / "classes.json").read_text()) == ["background", *CLASSES]
    for index in range(5):
        scene = draw("neon", split_seed("test"), index)
        assert (np.asarray(Image.open(folder / "images" / "test" / f"{index:06d}.png")) == scene.image).all()
        assert (np.asarray(Image.open(folder / "annotations" / "test" / f"{index:06d}.png")) == scene.semantic).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools
def test_coco_masks_and_boxes_are_those_of_the_scene(world: Path) -> None:
    content = json.loads((world / "neon" / "instances" / "test.json").read_text())
    assert [category["name"] for category in content["categories"]] == list(CLASSES)
    assert len({row["id"] for row in content["annotations"]}) == len(content["annotations"])
    for image in content["images"]:
        scene = draw("neon", split_seed("test"), image["id"] - 1)
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        assert [row["category_id"] - 1 for row in rows] == scene.classes.tolist()
        for row, mask, box in zip(rows, scene.masks, scene.boxes, strict=True):
            packed = coco_mask.frPyObjects(row["segmentation"], 96, 96)
            assert (coco_mask.decode(packed) == mask).all()
            assert row["area"] == mask.sum()
            x, y, width, height = row["bbox"]
            assert [x, y, x + width, y + height] == box.tolist()


def test_run_lengths_begin_with_zeros() -> None:
    assert mask_to_runs(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert mask_to_runs(np.zeros((2, 2), dtype=bool)) == [4]
    assert mask_to_runs(np.ones((2, 2), dtype=bool)) == [0, 4]


def test_an_existing_world_is_not_written_again(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert write_world(world, ["neon"], COUNTS) == []
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}


def test_a_folder_with_other_content_is_refused_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="remove it"):
        write_world(world, ["ink", "neon"], COUNTS, seed=7)
    assert not (world / "ink").exists()
    (tmp_path / "ink").mkdir()
    with pytest.raises(RecipeError, match="is not a world"):
        write_world(tmp_path, ["ink"], COUNTS)


def test_an_interrupted_style_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path, ["ink"], COUNTS, on_scene=stop)
    assert not (tmp_path / "ink").exists()
    assert write_world(tmp_path, ["ink"], {"train": 2}) == [tmp_path / "ink"]
    assert [path.name for path in tmp_path.iterdir()] == ["ink"]


def test_disks_without_hard_links_get_copies(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    write_world(tmp_path, ["neon"], COUNTS)
    assert digest(tmp_path / "neon") == digest(world / "neon")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"styles": ["photo"]}, "photo"),
        ({"styles": []}, "none"),
        ({"counts": {"train": 0}}, "at least one"),
        ({"counts": {"dev": 3, "train": 1}}, "dev"),
        ({"size": 20}, "20 px"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        write_world(tmp_path / "w", **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "w").exists()


def test_the_source_draws_the_scenes_of_its_names() -> None:
    source: ImageSource = unlabelled(count=9, styles=["ink", "neon"], seed=2)
    assert len(source) == 9 and source.labels is None and source.label(3) is None
    assert len({source.name(index) for index in range(9)}) == 9
    drawn = np.asarray(Image.open(io.BytesIO(source.read(5))))
    assert (drawn == draw("neon", split_seed("unlabelled", 2), 2).image).all()


def test_a_recipe_can_name_the_source_as_a_function() -> None:
    assert len(call_source("shoulders.world:unlabelled", count=7)) == 7
    for function, settings, message in (
        ("shoulders.world:unlabelled", {"count": 0}, "at least one"),
        ("shoulders.world:unlabelled", {"counts": 3}, "counts"),
        ("shoulders.world:absent", {}, "no function 'absent'"),
        ("shoulders.nowhere:unlabelled", {}, "no Python module"),
        ("shoulders.world.unlabelled", {}, "package.module:function"),
        ("shoulders.world:split_seed", {"split": "test"}, "ImageSource"),
    ):
        with pytest.raises(RecipeError, match=message):
            call_source(function, **settings)
