"""Teacher heads on labelled images: scores equal those computed by hand; other classes and sizes are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.errors import DataError, RecipeError
from shoulders.inference import HeadInput, head_on_teacher
from shoulders.tasks import TASKS, Row, task_of_head
from shoulders.tasks.average_precision import Detections, average_precision, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations
from shoulders.tasks.detection import boxes_of_output
from shoulders.tasks.skipped import max_unreadable
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
    return TASKS[task].evaluate_head(head, TASKS[task].find_splits(path, "image", fit=False), batch, workers)


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


def test_top1_among_the_classes_that_both_have(scenes: Path, tmp_path: Path) -> None:
    """The classes are in the names of the files, written in another way; one of them the head lacks."""
    head, source = shipped_head("classifier"), scenes / "neon" / "classification" / "test"
    chosen = [CLASSES[i] for i in (1, 3, 4, 6)]
    files = [(file, name) for name in chosen for file in sorted((source / name).glob("*.png"))]
    for number, (file, name) in enumerate(files):
        shutil.copy(file, tmp_path / f"{name.upper()}_{number}.png")
    shutil.copy(files[0][0], tmp_path / "unicorn.png")
    row = evaluate(head, "classification", tmp_path, batch=7)[0]
    common = torch.tensor([head.classes.index(name) for name in chosen])
    hits = [
        chosen[int(head.compute_output(pixels_of(file)).logits[0, common].argmax())] == name for file, name in files
    ]
    assert (row["n"], row["value"]) == (len(files), pytest.approx(sum(hits) / len(files)))
    settings = row["settings"]
    assert (settings["classes"], settings["head_classes_left_out"]) == (4, len(head.classes) - 4)
    assert "1 of the data ('unicorn'; images: 1)" in str(settings["classes_left_out"])
    assert settings["split"] == "all images"


def head_with_logits(logits: Tensor, classes: list[str]) -> HeadInput:
    """A head whose output for an image is the row of ``logits`` that the red of its first pixel names."""

    class Head:
        def __init__(self) -> None:
            self.classes, self.processor = classes, None

        def __call__(self, rows: dict[str, Tensor]) -> SimpleNamespace:
            return SimpleNamespace(logits=logits[rows["rows"]])

    compute: Any = lambda pixels: {"rows": (pixels[:, 0, 0, 0] * 255).round().long()}  # noqa: E731
    head: Any = Head()
    return HeadInput(head, (8, 8), compute)


@pytest.mark.parametrize(("shared", "top5"), [(10, 0.75), (9, None)])
def test_top5_is_the_fraction_of_images_of_one_of_the_five_best_classes(
    shared: int, top5: float | None, tmp_path: Path
) -> None:
    names = [f"class{i}" for i in range(shared)]
    # the rank of the true class among the classes of the data: 0, 4, 5, 2; other classes of the head are above all
    ranks, logits = (0, 4, 5, 2), torch.full((4, shared + 3), 9.0)
    for image, rank in enumerate(ranks):
        logits[image, :shared] = torch.arange(shared).roll(image - rank).neg().float()
        (tmp_path / "test" / names[image]).mkdir(parents=True)
        Image.new("RGB", (8, 8), (image, 0, 0)).save(tmp_path / "test" / names[image] / "0.png")
    for name in names[len(ranks) :]:
        (tmp_path / "test" / name).mkdir()
        Image.new("RGB", (8, 8), (0, 0, 0)).save(tmp_path / "test" / name / "0.png")
    head = head_with_logits(logits, [*names, "one", "two", "three"])
    splits = TASKS["classification"].find_splits(tmp_path, "image", fit=False)
    kept = np.flatnonzero(splits.test.labels() < len(ranks))
    rows = TASKS["classification"].evaluate_head(head, replace(splits, test=splits.test.take(kept)), 3, 0)
    values = {"top1": 0.25} | ({} if top5 is None else {"top5": top5})
    assert {row["metric"]: (row["value"], row["n"]) for row in rows} == {name: (v, 4) for name, v in values.items()}
    assert rows[0]["metric"] == "top1" and rows[0]["settings"]["classes"] == shared


def test_data_of_one_common_class_is_refused(scenes: Path, tmp_path: Path) -> None:
    for name in (CLASSES[0], "unicorn"):
        shutil.copytree(scenes / "studio/classification/test" / CLASSES[0], tmp_path / "test" / name)
    with pytest.raises(RecipeError, match=f"only '{CLASSES[0]}' in common"):
        evaluate(shipped_head("classifier"), "classification", tmp_path)


@pytest.mark.parametrize("has_background", [True, False])
def test_ious_of_the_classes_that_both_have(has_background: bool, scenes: Path, tmp_path: Path) -> None:
    """Pixels of another class, of the head or of the data, are background, or none of the classes."""
    head, data = shipped_head("segmenter"), tmp_path / "data"
    shutil.copytree(scenes / "paper" / "semantic", data, ignore=shutil.ignore_patterns("train"))
    names = ["background", *CLASSES]
    renamed = [name if i in (0, 2, 5) else f"unicorn {i}" for i, name in enumerate(names)]
    renamed[0] = "background" if has_background else "rest"
    (data / "classes.json").write_text(json.dumps(renamed))
    scores = {row["metric"]: row["value"] for row in evaluate(head, "semantic", data)}
    labels, predicted = [], []
    for file in sorted((data / "images" / "test").glob("*.png")):
        logits = torch.nn.functional.interpolate(
            head.compute_output(pixels_of(file)).logits, (96, 96), mode="bilinear", align_corners=False
        )
        labels.append(np.asarray(Image.open(str(file).replace("images", "annotations"))).ravel())
        predicted.append(logits[0].argmax(0).flatten().numpy())
    common = [0, 2, 5] if has_background else [2, 5]
    all_labels = np.concatenate(labels)
    true, guess = (np.where(np.isin(x, common), x, 0) for x in (all_labels, np.concatenate(predicted)))
    ious = {names[i]: ((true == i) & (guess == i)).sum() / ((true == i) | (guess == i)).sum() for i in common}
    assert {name: scores[f"IoU/{name}"] for name in ious} == pytest.approx(ious)
    assert scores["mIoU"] == pytest.approx(np.mean(list(ious.values())))
    counted = np.isin(all_labels, common) | has_background
    assert scores["pixel_accuracy"] == pytest.approx((true == guess)[counted].mean())
    assert len(scores) == 2 + len(ious)


def test_ap_of_the_classes_that_both_have(scenes: Path, tmp_path: Path) -> None:
    """Objects of a class that the head lacks do not count, and neither do detections of one that the data lacks."""
    head, data = shipped_head("detector"), tmp_path / "data"
    shutil.copytree(scenes / "neon/instances", data, ignore=shutil.ignore_patterns("train*"))
    content = json.loads((data / "test.json").read_text())
    for category in content["categories"][4:]:
        category["name"] = f"unicorn {category['id']}"
    content["categories"].append({"id": 99, "name": "things"})
    (data / "test.json").write_text(json.dumps(content))
    rows = evaluate(head, "detection", data)
    split = TASKS["detection"].find_splits(scenes / "neon/instances", "image").test
    detections, images = [], []
    for index, image in zip(split.indices.tolist(), split.annotations, strict=True):
        output = head.compute_output(pixels_of(scenes / "neon/instances/test" / split.images.name(index)))
        (found,) = boxes_of_output(head.processor, output, [image.size])
        kept, known = found.classes < 4, image.classes < 4
        detections.append(Detections(found.classes[kept], found.scores[kept], found.boxes[kept]))
        objects = image.classes[known], image.boxes[known], image.areas[known], image.crowd[known]
        images.append(AnnotatedImage(image.file, image.size, *objects))
    assert head.classes[:4] == list(CLASSES[:4])
    expected = average_precision(match(Annotations(tuple(CLASSES[:4]), tuple(images)), detections))
    assert {row["metric"]: row["value"] for row in rows}["AP"] == pytest.approx(expected["AP"])
    unknown = sum(int((image.classes >= 4).sum()) for image in split.annotations)
    assert (rows[0]["settings"]["classes"], rows[0]["settings"]["labels_left_out"]) == (4, unknown)


@pytest.mark.parametrize(("name", "folder"), [("segmenter", "paper/semantic"), ("detector", "neon/instances")])
def test_annotations_of_another_size_than_their_image_are_refused(
    name: str, folder: str, scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes / folder, tmp_path / "data")
    first = min(path for path in (tmp_path / "data").rglob("test/*.png") if "annotations" not in path.parts)
    Image.open(first).convert("RGB").resize((48, 40)).save(first)
    with pytest.raises(DataError, match=f"{first.name}: the image is 48 x 40 px, its labels are for 96 x 96 px"):
        evaluate(shipped_head(name), TEACHER_TASKS[name].task, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("classifier", "studio/classification"), ("segmenter", "paper/semantic"), ("detector", "neon/instances")],
)
def test_images_that_cannot_be_read_are_skipped_and_counted(
    name: str, folder: str, scenes: Path, tmp_path: Path
) -> None:
    """As for a probe: the value is that of the set without them; too many are refused."""
    task, head, data = TEACHER_TASKS[name].task, shipped_head(name), tmp_path / "data"
    shutil.copytree(scenes / folder, data)
    splits = TASKS[task].find_splits(data, "image")
    files = sorted(path for path in data.rglob("*.png") if "test" in path.parts and "annotations" not in path.parts)
    remaining = np.array([i for i, name in enumerate(names_of_test(splits)) if Path(name).name not in broken(files)])
    expected = TASKS[task].evaluate_head(head, replace(splits, test=splits.test.take(remaining)), 20, 0)
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:60])
    with max_unreadable(0.05):
        rows = TASKS[task].evaluate_head(head, splits, 7, 0)
    assert {row["metric"]: row["value"] for row in rows} == {row["metric"]: row["value"] for row in expected}
    assert rows[0]["n"] == 38 and rows[0]["settings"]["skipped_test"] == 2
    assert str(rows[0]["settings"]["skipped_reasons"]).startswith("2 ")
    with pytest.raises(DataError, match=r"[12] of 40 labelled images cannot be read, .*; at most 0.01 of them may be"):
        TASKS[task].evaluate_head(head, splits, 7, 0)


def test_a_set_whose_objects_cannot_be_read_is_refused(scenes: Path, tmp_path: Path) -> None:
    """The only image with an object is damaged."""
    shutil.copytree(scenes / "neon/instances", tmp_path / "data")
    splits = TASKS["detection"].find_splits(tmp_path / "data", "image")
    annotations = [splits.test.annotations[0], *(without_objects(one) for one in splits.test.annotations[1:])]
    splits = replace(splits, test=replace(splits.test, annotations=annotations))
    first = tmp_path / "data/test" / splits.test.images.name(int(splits.test.indices[0]))
    first.write_bytes(b"")
    no_label = r"none of the 39 test images .* has a label; skipped: 1 empty file \("
    with max_unreadable(0.05), pytest.raises(DataError, match=no_label):
        TASKS["detection"].evaluate_head(shipped_head("detector"), splits, 20, 0)


def names_of_test(splits: Any) -> list[str]:
    return [splits.test.images.name(index) for index in splits.test.indices.tolist()]


def broken(files: list[Path]) -> set[str]:
    return {file.name for file in files[:2]}


def without_objects(image: AnnotatedImage) -> AnnotatedImage:
    none = np.zeros(0)
    return AnnotatedImage(image.file, image.size, none.astype(int), none.reshape(0, 4), none, none.astype(bool), ())
