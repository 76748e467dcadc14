"""`evaluate --heads`: the heads that a student keeps are evaluated on data with their classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoulders.errors import RecipeError
from shoulders.evaluation.evaluate import evaluate
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.student.files import finish_folder
from shoulders.world import CLASSES, write_world
from tests.teachers.heads.test_saved import run  # noqa: F401
from tests.tiny import save_images


def name_classes(head: Path, names: list[str]) -> None:
    """Give a kept head other class names, as if the student had been saved with them."""
    config = json.loads((head / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (head / "config.json").write_text(json.dumps(config))
    finish_folder(head.parents[1])


@pytest.fixture
def copied_run(run: Path, tmp_path: Path) -> Path:  # noqa: F811
    return shutil.copytree(run, tmp_path / "run")


def test_heads_of_other_classes_or_tasks_are_refused(copied_run: Path, tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    write_world(scenes, ["paper", "ink"], counts={"train": 12, "val": 0, "test": 4})
    with pytest.raises(RecipeError, match="have no class in common"):
        evaluate_heads(copied_run, "semantic", scenes / "paper" / "semantic", ["student"])
    for name in ("segformer", "rt_detr_v2"):
        name_classes(copied_run / "student" / "heads" / name, ["background", *CLASSES][:2])
    with pytest.raises(RecipeError, match="no head does instance with the classes of the data"):
        evaluate_heads(copied_run, "instance", scenes / "ink" / "instances", ["student"])
    with pytest.raises(RecipeError, match="--task: 'depth' is not one of"):
        evaluate_heads(copied_run, "depth", scenes, ["student"])


def test_a_head_of_other_classes_is_left_out(copied_run: Path, tmp_path: Path) -> None:
    heads = copied_run / "student/heads"
    name_classes(shutil.copytree(heads / "segformer", heads / "other"), ["sky", "sea"])
    for split in ("train", "test"):
        for folder in ("images", "annotations"):
            (tmp_path / "data" / folder / split).mkdir(parents=True)
        Image.new("RGB", (32, 32), {"train": "red", "test": "blue"}[split]).save(
            tmp_path / "data/images" / split / "a.png"
        )
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(tmp_path / "data/annotations" / split / "a.png")
    (tmp_path / "data/classes.json").write_text('["LABEL_0", "LABEL_1"]')
    with pytest.warns(UserWarning, match="left out: student, head of other: .* have no class in common"):
        rows = evaluate_heads(copied_run, "semantic", tmp_path / "data", ["student"], workers=0)
    assert {row["head"] for row in rows} == {"segformer"}
    saved = [row for row in json.loads((copied_run / "results.json").read_text()) if row["task"] == "semantic"]
    assert len(saved) == len(rows)


def test_a_head_is_scored_on_the_classes_that_both_have(copied_run: Path, tmp_path: Path) -> None:
    """A split to evaluate on is enough; a file maps names; what is left out is told once and stands in the rows."""
    heads = copied_run / "student/heads"
    name_classes(heads / "segformer", ["sofa", "cat"])
    for folder in ("images", "annotations"):
        (tmp_path / "data" / folder / "val").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "data/images/val/a.png")
    Image.fromarray(np.eye(32, dtype=np.uint8) + 1).save(tmp_path / "data/annotations/val/a.png")
    (tmp_path / "data/classes.json").write_text('["rug", "Cat", "couch"]')
    (tmp_path / "map.json").write_text('{"couch": "sofa"}')
    with pytest.warns(UserWarning, match=r"do not share: 1 of the data \('rug'; pixels: 0\); .* scored on: 2"):
        rows = evaluate_heads(
            copied_run, "semantic", tmp_path / "data", ["student"], workers=0, classes=tmp_path / "map.json"
        )
    assert {row["metric"] for row in rows} == {"mIoU", "pixel_accuracy", "IoU/Cat", "IoU/couch"}
    settings = rows[0]["settings"]
    assert (settings["classes"], settings["split"]) == (2, "val as given")
    assert settings["input"] == "whole image resized to 32 x 32 px (h x w), bicubic"
    with pytest.raises(RecipeError, match="--classes: 'couch' is class 2 of the head, which has 0 to 1"):
        (tmp_path / "map.json").write_text('{"couch": 2}')
        evaluate_heads(copied_run, "semantic", tmp_path / "data", ["student"], classes=tmp_path / "map.json")


def test_a_missing_teacher_is_reported_before_any_evaluation(run: Path, tmp_path: Path) -> None:  # noqa: F811
    save_images(tmp_path, 12, classes=2)
    models: list[str] = []
    with pytest.raises(RecipeError, match=r"recipe\.yaml: teachers\..* leave the teacher out: --models student,base"):
        evaluate(run, "classification", tmp_path, workers=0, on_model=models.append)
    assert not models
