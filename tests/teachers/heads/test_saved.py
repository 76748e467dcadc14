"""Heads that a student keeps: trained for on their own grids, stored with it, and run without the teacher."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.distillation import distill
from shoulders.errors import DataError, RecipeError
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head, taps_of_teacher
from shoulders.teachers.heads.post_process import post_process
from shoulders.teachers.heads.saved import open_head, save_head
from tests.teachers.conftest import RF_DETR, TINY, VIT
from tests.teachers.image_text import save_image_text
from tests.tiny import save_base, save_images, tiny_recipe

KINDS = ("resnet", "rt_detr_v2", "rf_detr", "segformer", "maskformer", "depth_anything", "dpt", "sam")
PROCESSORS = {
    "resnet": "ConvNextImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "segformer": "SegformerImageProcessor",
    "maskformer": "MaskFormerImageProcessor",
    "rf_detr": "RfDetrImageProcessor",  # needs torchvision, which may be missing
    "depth_anything": "DPTImageProcessor",
    "dpt": "DPTImageProcessor",
    "sam": "SamImageProcessor",
}


def save_teacher(kind: str, folder: Path) -> TeacherSpec:
    torch.manual_seed(1)
    model = TINY[kind]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    side = {"sam": 64, "depth_anything": 28, "dpt": 32}.get(kind, 64)
    settings = {"image_processor_type": PROCESSORS[kind], "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return TeacherSpec(model=str(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    save_base(root / "base")
    save_images(root / "images", 24)
    kinds = ("segformer", "rt_detr_v2", "resnet")
    recipe = tiny_recipe(
        root,
        student__adapter__width=4,
        teachers={kind: save_teacher(kind, root / kind).model_dump() for kind in kinds},
        images__holdout=8,
        train__steps=2,
        train__batch=4,
        keep_heads=["segformer", "rt_detr_v2"],
    )
    distill(recipe)
    for kind in kinds:
        shutil.rmtree(root / kind)  # the heads must work without the teachers
    return root / "run"


def test_kept_heads_run_without_the_teachers(run: Path) -> None:
    student = shoulders.load(run)
    assert list(student.heads) == ["rt_detr_v2", "segformer"]
    pixels = torch.rand(2, 3, 32, 32)
    maps = student.predict("segformer", pixels, sizes=[(50, 40), (20, 30)])
    assert [{tuple(one["mask"].shape) for one in image} for image in maps] == [{(50, 40)}, {(20, 30)}]
    assert all(torch.stack([one["mask"] for one in image]).sum(0).eq(1).all() for image in maps)
    boxes = student.predict("rt_detr_v2", pixels, threshold=0.0)
    assert all(set(one) == {"label", "score", "box"} for image in boxes for one in image)
    assert boxes != student.predict("rt_detr_v2", 1 - pixels, threshold=0.0)
    again = shoulders.load(run).predict("rt_detr_v2", pixels, threshold=0.0)
    assert again == boxes


def test_auto_model_loads_a_student_with_heads_and_save_pretrained_copies_them(run: Path, tmp_path: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    student = hf.AutoModel.from_pretrained(run / "student").eval()
    boxes = student.predict("rt_detr_v2", pixels, threshold=0.0)
    student.save_pretrained(tmp_path / "copy")
    student.save_pretrained(tmp_path / "copy")  # over itself
    assert shoulders.load(tmp_path / "copy").predict("rt_detr_v2", pixels, threshold=0.0) == boxes


@pytest.mark.parametrize(
    "settings", [{"num_labels": 3, "problem_type": "multi_label_classification"}, {"num_labels": 1}, {"num_labels": 3}]
)
def test_scores_of_classes_are_those_of_the_transformers_pipeline(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.ViTForImageClassification(hf.ViTConfig(**VIT, **settings)).save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    spec = TeacherSpec(model=str(tmp_path))
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    (ours,) = post_process(head, head(teacher(pixels)), [(32, 32)])
    theirs = hf.pipeline("image-classification", model=str(tmp_path))(Image.fromarray(image))
    assert [one["label"] for one in ours] == [one["label"] for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)


def test_a_class_without_a_name_keeps_its_index(tmp_path: Path) -> None:
    hf.ViTForImageClassification(hf.ViTConfig(**VIT, id2label={1: "cat", 2: "dog"})).save_pretrained(tmp_path)
    spec = TeacherSpec(model=str(tmp_path))
    assert load_head("t", spec, load_teacher("t", spec)).classes == ["LABEL_0", "cat", "dog"]


@pytest.mark.parametrize("fault", ["no weights", "same embeddings"])
def test_a_head_that_cannot_be_kept_is_refused_before_the_first_step(fault: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_images(tmp_path / "images", 24)
    teacher: dict[str, Any] = {"model": str(tmp_path / "teacher")}
    if fault == "no weights":
        hf.ViTModel(hf.ViTConfig(**VIT)).save_pretrained(tmp_path / "teacher")
        config = json.loads((tmp_path / "teacher" / "config.json").read_text())
        config["architectures"] = ["ViTForImageClassification"]
        (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    else:
        save_image_text("clip", tmp_path / "teacher")
        teacher["classes"] = ["zzzz", "qqqq"]
    recipe = tiny_recipe(
        tmp_path,
        teachers={"t": teacher},
        images__holdout=8,
        train__steps=2,
        train__batch=4,
        keep_heads=["t"],
    )
    with pytest.raises((DataError, RecipeError), match=r"the weights lack classifier|gives some of the classes"):
        distill(recipe)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_predicting_with_a_head_that_was_not_kept_is_refused(run: Path) -> None:
    with pytest.raises(RecipeError, match="not kept by this student; it has rt_detr_v2, segformer"):
        shoulders.load(run).predict("resnet", torch.rand(1, 3, 32, 32))


def test_heads_move_to_the_device_of_the_student(run: Path) -> None:
    student = shoulders.load(run)
    student.head("segformer")
    student.to("meta")
    assert {p.device.type for p in student.head("segformer").parameters()} == {"meta"}


def test_taps_of_a_kept_head_are_predicted_on_the_teachers_grid(run: Path) -> None:
    student = shoulders.load(run)
    features = student.predict_teacher_features(torch.rand(2, 3, 32, 32))
    student_grid = student.encoder(torch.rand(2, 3, 32, 32))["latent"].grid
    head = student.head("segformer")
    for tap, predicted in taps_of_teacher("segformer", features).items():
        needed = head.taps[tap].grid
        assert all(side >= least for side, least in zip(predicted.grid, needed, strict=True))
    assert taps_of_teacher("resnet", features)["stage3"].grid <= student_grid  # this head was not kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_gives_the_same_predictions(kind: str, tmp_path: Path) -> None:
    spec = save_teacher(kind, tmp_path / kind)
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    save_head(head, tmp_path / "head")
    whole, kept = (sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in (kind, "head"))
    assert kept < whole
    features = teacher(torch.rand(2, 3, *teacher.size))
    prompts = {"input_points": torch.full((2, 1, 1, 2), 20.0)} if kind == "sam" else {}
    before = post_process(head, head(features, **prompts), [(40, 30), (64, 64)], threshold=0.0)
    opened = open_head(tmp_path / "head")
    after = post_process(opened, opened(features, **prompts), [(40, 30), (64, 64)], threshold=0.0)
    assert len(before) == 2
    assert to_lists(before) == to_lists(after)


def to_lists(value: Any) -> Any:
    """Tensors as lists, so that predictions can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: to_lists(part) for name, part in value.items()}
    return [to_lists(part) for part in value] if isinstance(value, list) else value


def test_boxes_are_those_of_the_image_processor(tmp_path: Path) -> None:
    spec = save_teacher("rt_detr_v2", tmp_path / "rt_detr_v2")
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    model = hf.AutoModelForObjectDetection.from_pretrained(str(spec.model)).eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        output = model(pixel_values=(pixels - teacher.mean) / teacher.std)
    expected = hf.AutoImageProcessor.from_pretrained(str(spec.model)).post_process_object_detection(
        output, threshold=0.3, target_sizes=[(100, 200)]
    )[0]
    predictions = post_process(head, head(teacher(pixels)), [(100, 200)], threshold=0.3)[0]
    assert [one["score"] for one in predictions] == pytest.approx(expected["scores"].tolist())
    assert torch.tensor([list(one["box"].values()) for one in predictions]).allclose(expected["boxes"])
    assert list(predictions[0]["box"]) == ["xmin", "ymin", "xmax", "ymax"]


@torch.no_grad()
def test_a_student_with_loaded_heads_can_be_pickled(run: Path) -> None:
    student, pixels = shoulders.load(run), torch.rand(1, 3, 32, 32)
    assert [student.head(name).class_name for name in student.heads]
    again = pickle.loads(pickle.dumps(student))  # noqa: S301
    expected = {name: to_lists(student.predict(name, pixels, threshold=0.0)) for name in student.heads}
    assert {name: to_lists(again.predict(name, pixels, threshold=0.0)) for name in again.heads} == expected


def test_damaged_heads_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "student" / "heads" / "segformer", tmp_path / "head")
    weights = tmp_path / "head" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a valid head"):
        open_head(tmp_path / "head")
    (tmp_path / "head" / "head.json").unlink()
    with pytest.raises(DataError, match="not a valid head"):
        open_head(tmp_path / "head")


def test_post_processing_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    spec = save_teacher("segformer", tmp_path / "s")
    (tmp_path / "s" / "preprocessor_config.json").unlink()
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    if head.processor is None:
        with pytest.raises(RecipeError, match="preprocessor_config"):
            post_process(head, head(teacher(torch.rand(1, 3, *teacher.size))), [(32, 32)])


def test_masks_without_the_detectors_own_image_processor_are_refused(tmp_path: Path) -> None:
    spec = save_teacher("rf_detr", tmp_path / "r")
    torch.manual_seed(0)
    hf.RfDetrForInstanceSegmentation(hf.RfDetrConfig(**RF_DETR)).save_pretrained(tmp_path / "r")
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    if not hasattr(head.processor, "post_process_instance_segmentation"):  # without torchvision
        with pytest.raises(RecipeError, match="install torchvision"):
            post_process(head, head(teacher(torch.rand(1, 3, *teacher.size))), [(32, 32)])


def test_unknown_names_in_keep_heads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(RecipeError, match="^keep_heads: nobody not among teachers: classifier, segmenter$"):
        distill(tiny_recipe(tmp_path, keep_heads=["nobody"]))
