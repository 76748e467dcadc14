"""FastestDet as a teacher given as ``module:``: random weights of the published names and shapes, and the real ones."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.strangers.fastestdet import CLASSES, HEAD, Encoder, Head, to_corners
from shoulders.config.sections import TeacherSpec
from shoulders.distillation import distill
from shoulders.errors import RecipeError
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.teachers import Tap, load_teacher
from shoulders.teachers.heads import load_head
from shoulders.teachers.heads.post_process import post_process
from shoulders.teachers.heads.saved import open_head, save_head
from tests.tiny import save_base, save_images, tiny_recipe


def random_weights(folder: Path) -> Path:
    """A folder with random weights, as the published one is."""
    torch.manual_seed(0)
    weights = Encoder().state_dict() | {f"{HEAD}{name}": value for name, value in Head(CLASSES).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def spec_of(folder: Path) -> TeacherSpec:
    return TeacherSpec(module="benchmarks.strangers.fastestdet:teacher", args={"folder": str(folder)})


def test_the_encoder_is_a_teacher_with_one_tap(tmp_path: Path) -> None:
    teacher = load_teacher("detector", spec_of(random_weights(tmp_path)))
    assert teacher.taps == {"spp": Tap(None, 96, (22, 22))}
    assert (teacher.size, teacher.license) == ((352, 352), "bsd-3-clause")


def test_its_weights_have_the_published_names_and_shapes(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "strangers" / "fastestdet_coco" / "model.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with safe_open(file, "pt") as weights:
        published = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    with safe_open(random_weights(tmp_path) / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if "num_batches" not in name]  # noqa: SIM118
        assert published == {name: weights.get_slice(name).get_shape() for name in names}


def test_without_weights_it_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^teachers\.detector\.module: .*fails: .*model.safetensors"):
        load_teacher("detector", spec_of(tmp_path))


def test_arguments_need_a_function() -> None:
    with pytest.raises(ValueError, match="args needs module"):
        TeacherSpec(model="a", args={"folder": "b"})


def test_its_head_is_kept_with_its_weights(tmp_path: Path) -> None:
    spec = spec_of(random_weights(tmp_path))
    teacher = load_teacher("detector", spec)
    head = load_head("detector", spec, teacher)
    save_head(head, tmp_path / "head")
    features = teacher(torch.rand(1, 3, *teacher.size))
    expected, got = (post_process(each, each(features), [(40, 60)]) for each in (head, open_head(tmp_path / "head")))
    assert expected == got
    assert {label["label"] for label in got[0]} <= set(CLASSES) and len(CLASSES) == 80


def test_a_box_is_the_offset_of_its_centre_and_its_size() -> None:
    values = torch.zeros(1, 4, 2, 4)  # (B, 4, H, W)
    values[0, :, 1, 2] = torch.tensor([0.5, -1.0, 0.0, 2.0])
    left, top, right, bottom = to_corners(values)[0, :, 1, 2].tolist()
    assert (left + right) / 2 == pytest.approx((2 + math.tanh(0.5)) / 4)
    assert (top + bottom) / 2 == pytest.approx((1 + math.tanh(-1)) / 2)
    assert right - left == pytest.approx(0.5)
    assert bottom - top == pytest.approx(1 / (1 + math.exp(-2)))


def test_overlapping_boxes_of_one_class_are_one_object() -> None:
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0, 0, 0.5, 0.4], [0.5, 0.5, 1, 1], [0, 0, 0.5, 0.5]]).T.view(1, 4, 2, 2)
    scores, labels = torch.tensor([0.8, 0.9, 0.3, 0.7]).view(1, 2, 2), torch.tensor([3, 3, 3, 5]).view(1, 2, 2)
    outputs = {"boxes": boxes, "scores": scores, "labels": labels}
    (image,) = Head(CLASSES).post_process(outputs, [(100, 200)], threshold=0.5)
    assert image["labels"].tolist() == [3, 5]
    assert image["boxes"].tolist() == [[0, 0, 100, 40], [0, 0, 100, 50]]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "ap"), [("pennfudan", 0.628), ("coco128/det", 0.182)])
def test_the_published_weights_have_the_accuracy_of_their_card(
    shared_data: Path, tmp_path: Path, data: str, ap: float
) -> None:
    folder = shared_data / "strangers" / "fastestdet_coco"
    if not folder.is_dir() or not (shared_data / data).is_dir():
        pytest.skip(f"no {folder}, or no {data} beside it")
    save_base(tmp_path / "base")
    save_images(tmp_path / "images", 24)
    teachers = {"detector": spec_of(folder).model_dump()}
    distill(tiny_recipe(tmp_path, teachers=teachers, keep_heads=["detector"], train__steps=1, images__holdout=8))
    (tmp_path / "map.json").write_text('{"pedestrian": "person"}')
    classes = tmp_path / "map.json" if data == "pennfudan" else None
    with nullcontext() if classes is None else pytest.warns(UserWarning, match="head of detector is scored on: 1"):
        rows = evaluate_heads(
            tmp_path / "run", "detection", shared_data / data, ["detector"], workers=0, classes=classes
        )
    values = {row["metric"]: row["value"] for row in rows}
    assert values["AP"] == pytest.approx(ap, abs=0.01)
