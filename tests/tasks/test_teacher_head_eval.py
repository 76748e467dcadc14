"""Teacher heads on labelled images: scores equal those computed by hand; other classes and sizes are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.errors import DataError, RecipeError
from shoulders.inference import HeadInput, head_on_teacher
from shoulders.tasks import TASKS, Row, task_of_head
from shoulders.tasks.teacher_head_eval import class_indices
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head
from shoulders.world import CLASSES, TEACHER_TASKS, TEACHERS, write_world

# least value of the headline metric on 40 scenes; benchmarks/world/cross.json has those on all test scenes
MIN_VALUES = {"classifier": 0.9, "detector": 0.6, "segmenter": 0.5, "instances": 0.5}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_world(folder, counts={"train": 40, "val": 0, "test": 40})
    return folder


def shipped_head(name: str) -> HeadInput:
    spec = TeacherSpec(model=str(TEACHERS / name))
    teacher = load_teacher(name, spec)
    return head_on_teacher(load_head(name, spec, teacher), teacher)


def evaluate(head: HeadInput, task: str, path: Path, batch: int = 20, workers: int = 0) -> list[Row]:
    return TASKS[task].evaluate_head(head, TASKS[task].find_splits(path, "image"), batch, workers)


def pixels_of(file: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("name", TEACHER_TASKS)
def test_shipped_teachers_are_good_at_their_own_task_and_style_only(name: str, scenes: Path) -> None:
    head, job = shipped_head(name), TEACHER_TASKS[name]
    assert task_of_head(head.head) == job.task
    values = []
    for style in (job.style, "neon" if name != "detector" else "studio"):
        rows = evaluate(head, job.task, scenes / style / job.labels)
        assert all(row["task"] == job.task and row["n"] == 40 for row in rows)
        values.append({row["metric"]: row["value"] for row in rows}[str(TASKS[job.task].metric.in_heads)])
    own_style, other_style = values
    assert own_style >= MIN_VALUES[name]
    assert other_style < own_style / 2


def test_top1_equals_that_computed_by_hand(scenes: Path) -> None:
    head, folder = shipped_head("classifier"), scenes / "studio" / "classification"
    top1 = evaluate(head, "classification", folder, batch=7)[0]["value"]
    files = sorted((folder / "test").rglob("*.png"))
    hits = [CLASSES[int(head.compute_output(pixels_of(file)).logits.argmax())] == file.parent.name for file in files]
    assert top1 == pytest.approx(sum(hits) / len(files))


def test_pixel_accuracy_equals_that_computed_by_hand(scenes: Path) -> None:
    head, folder = shipped_head("segmenter"), scenes / "paper" / "semantic"
    scores = {row["metric"]: row["value"] for row in evaluate(head, "semantic", folder, batch=16, workers=2)}
    correct = total = 0
    for file in sorted((folder / "images" / "test").glob("*.png")):
        logits = torch.nn.functional.interpolate(
            head.compute_output(pixels_of(file)).logits, (96, 96), mode="bilinear", align_corners=False
        )
        mask = torch.from_numpy(np.asarray(Image.open(str(file).replace("images", "annotations"))).copy())
        correct, total = correct + int((logits[0].argmax(0) == mask).sum()), total + mask.numel()
    assert scores["pixel_accuracy"] == pytest.approx(correct / total)
    assert 0 < scores["mIoU"] < 1 and f"IoU/{CLASSES[0]}" in scores


def test_classes_are_matched_by_name_and_equal_names_in_order() -> None:
    assert class_indices(["cat", "crane", "dog", "crane"], ["cat", "crane", "crane", "dog"]) == [0, 1, 3, 2]
    with pytest.raises(RecipeError, match="the head has 2 classes, the data 3"):
        class_indices(["cat", "dog"], ["cat", "dog", "dog"])


@pytest.mark.parametrize(("name", "folder"), [("segmenter", "paper/semantic"), ("detector", "neon/instances")])
def test_annotations_of_another_size_than_their_image_are_refused(
    name: str, folder: str, scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes / folder, tmp_path / "data")
    first = min(path for path in (tmp_path / "data").rglob("test/*.png") if "annotations" not in path.parts)
    Image.open(first).convert("RGB").resize((48, 40)).save(first)
    with pytest.raises(DataError, match=f"{first.name}: the image is 48 x 40 px, its labels are for 96 x 96 px"):
        evaluate(shipped_head(name), TEACHER_TASKS[name].task, tmp_path / "data")
