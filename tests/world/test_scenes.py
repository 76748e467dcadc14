"""Scenes: pure functions of style, seed and index, with labels that agree with the pixels."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from shoulders.errors import RecipeError
from shoulders.world import CLASSES, SPLITS, STYLES, Scene, draw, split_seed
from shoulders.world.shapes import SHAPES, depth

CODE = """
import hashlib
from shoulders.world import STYLES, draw
scenes = [draw(style, seed, index) for style in STYLES for seed in (0, 3) for index in range(5)]
print(hashlib.sha256(b"".join(s.image.tobytes() + s.masks.tobytes() + s.classes.tobytes() for s in scenes)).hexdigest())
"""
# Of scenes 0 to 19 of seed 0: sha256 of their classes, mean pixel, mean number of pixels covered by objects.
# The shipped teachers were trained on this world: a change of it requires training them again.
EXPECTED = {
    "studio": ("fe79d5330e9d225a", 119.23, 1648.5),
    "neon": ("50ac32b90dc6c404", 52.52, 1706.5),
    "paper": ("0105df196595d83e", 186.06, 1417.8),
    "ink": ("9015292f428feb63", 180.48, 1499.0),
}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {style: [draw(style, 0, index) for index in range(20)] for style in STYLES}


def test_other_processes_draw_the_same_scenes_bit_for_bit() -> None:
    runs = [subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(2)]
    scenes = [draw(style, seed, index) for style in STYLES for seed in (0, 3) for index in range(5)]
    expected = hashlib.sha256(b"".join(s.image.tobytes() + s.masks.tobytes() + s.classes.tobytes() for s in scenes))
    assert {run.stdout.strip() for run in runs} == {expected.hexdigest()}


@pytest.mark.parametrize("style", STYLES)
def test_the_scenes_are_those_that_the_shipped_teachers_were_trained_on(
    style: str, scenes: dict[str, list[Scene]]
) -> None:
    digest, mean, covered = EXPECTED[style]
    classes = hashlib.sha256(b"".join(scene.classes.tobytes() for scene in scenes[style])).hexdigest()[:16]
    assert classes == digest
    assert np.mean([scene.image.mean() for scene in scenes[style]]) == pytest.approx(mean, abs=0.05)
    assert np.mean([scene.masks.sum() for scene in scenes[style]]) == pytest.approx(covered, abs=0.5)


def test_scenes_of_other_styles_seeds_and_indices_differ() -> None:
    drawn = [draw(style, seed, index).image.tobytes() for style in STYLES for seed in (0, 1) for index in (0, 1)]
    assert len(set(drawn)) == len(drawn)


def test_no_two_splits_of_any_two_worlds_share_a_seed() -> None:
    seeds = [split_seed(split, seed) for seed in range(5) for split in SPLITS]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("style", STYLES)
def test_labels_agree_with_each_other(style: str, scenes: dict[str, list[Scene]]) -> None:
    for scene in scenes[style]:
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.masks.sum(0).max() <= 1
        assert scene.masks.sum((1, 2)).min() >= 1
        areas = scene.masks.sum((1, 2))
        assert scene.label == scene.classes[np.argmax(areas)]
        semantic = np.zeros((96, 96), dtype=np.uint8)
        for kind, mask, box in zip(scene.classes, scene.masks, scene.boxes, strict=True):
            semantic[mask] = kind + 1
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (semantic == scene.semantic).all()


@pytest.mark.parametrize("style", STYLES)
def test_edges_of_the_image_are_at_the_borders_of_the_masks(style: str) -> None:
    edges_on, edges_off = [], []
    for index in range(30):
        scene = draw(style, 5, index)
        grey = scene.image.astype(float).mean(2)
        slope = np.hypot(*np.gradient(grey))
        owner = scene.semantic
        border = (owner != np.roll(owner, 1, 0)) | (owner != np.roll(owner, 1, 1))
        edges_on.append(slope[border].mean())
        edges_off.append(slope[~border & (owner == 0)].mean())
    assert np.mean(edges_on) > 1.5 * np.mean(edges_off)


def test_labels_are_balanced() -> None:
    count = np.bincount([draw("neon", 0, index).label for index in range(600)], minlength=len(CLASSES))
    assert count.min() >= 30 and count.max() <= 100


def test_a_scene_has_the_same_objects_at_every_size() -> None:
    for style in STYLES:
        small, large = draw(style, 0, 3), draw(style, 0, 3, size=192)
        assert small.classes.tolist() == large.classes.tolist()
        assert large.image.shape == (192, 192, 3)
        assert np.abs(large.boxes / 2 - small.boxes).max() <= 1.5
        shrunk = large.image.reshape(96, 2, 96, 2, 3).mean((1, 3))
        assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.8


def test_depth_is_the_distance_to_the_outline_in_px() -> None:
    y, x = np.mgrid[-40:41, -40:41].astype(np.float32)
    true = 30 - np.hypot(x, y)
    estimated = depth(np.hypot(x / 30, y / 30) - 1)
    near = np.abs(true) < 8
    assert np.abs(estimated - true)[near].max() < 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_one_piece_of_about_one_unit(name: str) -> None:
    y, x = np.mgrid[-2:2:201j, -2:2:201j].astype(np.float32)
    for bend in ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.99, 0.99, 0.99)):
        inside = SHAPES[name](x, y, bend) < 0
        assert 0.5 < inside.mean() * 16 < 3.2, bend  # of an area of 16
        assert not inside[:20].any() and not inside[-20:].any() and not inside[:, :20].any()
        from scipy.ndimage import label

        assert label(inside)[1] == 1, bend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photo", 0, 0, 96), "photo"),
        (("ink", -1, 0, 96), "-1"),
        (("ink", 0, -1, 96), "-1"),
        (("ink", 0, 0, 8), "8 px"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        draw(*arguments)
