"""The teacher's row of `evaluate --heads`: the teacher's own image processor, and predictions in px of the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.evaluation.published import PublishedHead, load_published_head
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.tasks import TASKS
from shoulders.tasks.average_precision import Detections
from shoulders.tasks.data.coco import decode, encode
from shoulders.tasks.detection import boxes_of_output
from shoulders.tasks.frame import Frame, whole_frame
from shoulders.tasks.object_heads import detections_in_image
from tests.evaluation.test_teacher_heads import copied_run  # noqa: F401
from tests.teachers.conftest import TINY
from tests.teachers.heads.test_saved import run  # noqa: F401

CPU = torch.device("cpu")
SIZE = (60, 80)  # (H, W) of the photo
EDGES = {"shortest_edge": 48, "longest_edge": 96}
# family, transformers' class for the model, its processor as published, small
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 2}),
    "dinov2": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True},
    ),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}),
    "clip_classifier": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    ),
    "efficientnet": ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 0}),
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("DetrImageProcessor", {"size": EDGES}),
    "deformable_detr": ("DeformableDetrImageProcessor", {"size": EDGES}),
    "rt_detr_v2": ("RTDetrImageProcessor", {"size": {"height": 64, "width": 64}}),
    "segformer": ("SegformerImageProcessor", {"size": {"height": 64, "width": 64}}),
    "mobilenet_v2_segmenter": (
        "MobileNetV2ImageProcessor",
        {"size": {"height": 65, "width": 65}, "do_center_crop": False},
    ),
    "maskformer": ("MaskFormerImageProcessor", {"size": EDGES, "size_divisor": 32}),
    "mask2former": ("Mask2FormerImageProcessor", {"size": EDGES, "size_divisor": 32}),
}
CROPPED = {"size": {"shortest_edge": 72}, "crop_size": {"height": 65, "width": 65}, "do_center_crop": True}


def save_teacher(kind: str, folder: Path, processor: str, settings: dict[str, Any]) -> TeacherSpec:
    torch.manual_seed(1)
    model = TINY[kind]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor, **settings}))
    return TeacherSpec(model=str(folder))


def published(kind: str, folder: Path, processor: str, settings: dict[str, Any]) -> PublishedHead:
    head = load_published_head(kind, save_teacher(kind, folder, processor, settings), CPU)
    assert head is not None
    return head


def photo() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(0)).byte()


def to_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@torch.no_grad()
def output_of(head: PublishedHead, pixels: Tensor) -> tuple[Any, Frame]:
    drawn = head.draw(pixels, SIZE)
    return head.compute_output(**{name: tensor[None] for name, tensor in drawn.tensors.items()}), drawn.frame


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_teachers_row_is_the_pipelines(kind: str, tmp_path: Path) -> None:
    head = published(kind, tmp_path, *CLASSIFIERS[kind])
    pipeline: Any = hf.pipeline("image-classification", model=str(tmp_path), top_k=1)
    expected = pipeline(to_pil(photo()))[0]
    scores = output_of(head, photo())[0].logits.softmax(-1)[0]
    assert head.classes[int(scores.argmax())] == expected["label"]
    assert float(scores.max()) == pytest.approx(expected["score"], abs=1e-6)
    assert head.input_description.startswith(CLASSIFIERS[kind][0])


@pytest.mark.parametrize("kind", DENSE)
def test_the_teachers_dense_output_is_that_of_its_whole_model(kind: str, tmp_path: Path) -> None:
    """Bit for bit, by a reference that calls transformers alone."""
    head = published(kind, tmp_path, *DENSE[kind])
    processor: Any = hf.AutoImageProcessor.from_pretrained(tmp_path)
    model = type(TINY[kind]()).from_pretrained(tmp_path).eval()
    inputs = processor(images=to_pil(photo()), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    output, frame = output_of(head, photo())
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(output[name], tensor), name
    assert frame == whole_frame(SIZE)
    if "detr" in kind:
        boxes = processor.post_process_object_detection(expected, threshold=0.0, target_sizes=[SIZE])[0]["boxes"]
        (found,) = boxes_of_output(head.processor, output, [frame.input_size])
        assert detections_in_image(found, frame).boxes == pytest.approx(boxes.numpy())


# where the photo lies in the input, for processors that crop, pad, keep the aspect or do not
GEOMETRY: dict[str, tuple[str, dict[str, Any]]] = {
    "squashed": ("SegformerImageProcessor", {"size": {"height": 64, "width": 64}}),
    "aspect": ("DetrImageProcessor", {"size": EDGES}),
    "padded": ("DetrImageProcessor", {"size": EDGES, "pad_size": {"height": 96, "width": 112}}),
    "divisible": ("Mask2FormerImageProcessor", {"size": EDGES, "size_divisor": 32}),
    "cropped": ("MobileNetV2ImageProcessor", CROPPED),
    "cropped and padded": ("MobileNetV2ImageProcessor", {**CROPPED, "crop_size": {"height": 90, "width": 60}}),
    "padded on all sides": (
        "DPTImageProcessor",
        {"size": {"height": 60, "width": 75}, "do_pad": True, "size_divisor": 32},
    ),
}


@pytest.mark.parametrize("case", GEOMETRY)
def test_boxes_and_masks_are_brought_back_to_the_original(case: str, tmp_path: Path) -> None:
    """A bright box is found where it is in the original, whatever the processor does to the image."""
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": GEOMETRY[case][0], "do_normalize": False, **GEOMETRY[case][1]})
    )
    processor: Any = hf.AutoImageProcessor.from_pretrained(tmp_path)
    head = PublishedHead(Any, processor, {}, lambda **tensors: tensors)  # type: ignore[arg-type]
    pixels = torch.zeros(3, *SIZE, dtype=torch.uint8)
    pixels[:, 20:40, 25:55] = 255
    drawn = head.draw(pixels, SIZE)
    frame, bright = drawn.frame, drawn.tensors["pixel_values"].mean(0)  # (h, w)
    in_input = torch.nn.functional.interpolate(bright[None, None], frame.input_size, mode="bilinear")[0, 0] > 0.5
    rows, columns = (in_input.any(axis).nonzero()[:, 0] for axis in (1, 0))
    box = np.array([[int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]], dtype=np.float64)
    assert frame.boxes_in_image(box) == pytest.approx(np.array([[25.0, 20, 55, 40]]), abs=1.5)
    mask = frame.maps_in_image(in_input, fill=0)
    assert tuple(mask.shape) == SIZE and float((mask == (pixels[0] > 0)).float().mean()) > 0.97
    assert (frame == whole_frame(SIZE)) == (case in ("squashed", "aspect", "divisible"))


def test_what_is_cropped_away_has_no_prediction() -> None:
    frame = Frame((4, 6), (4, 4), 0, -1)
    predicted = frame.maps_in_image(torch.ones(4, 4, dtype=torch.int64), fill=-1)
    assert predicted[0].tolist() == [-1, 1, 1, 1, 1, -1]
    assert frame.boxes_in_image(np.array([[0.0, 0, 4, 4]])).tolist() == [[1, 0, 5, 4]]


def test_pixels_that_are_cropped_away_count_as_missed(tmp_path: Path) -> None:
    head = published("mobilenet_v2_segmenter", tmp_path / "model", "MobileNetV2ImageProcessor", CROPPED)
    labels = np.random.default_rng(0).integers(0, 2, SIZE).astype(np.uint8)
    for folder, image in (("images", to_pil(photo())), ("annotations", Image.fromarray(labels))):
        (tmp_path / "data" / folder / "test").mkdir(parents=True)
        image.save(tmp_path / "data" / folder / "test/a.png")
    (tmp_path / "data/classes.json").write_text('["LABEL_0", "LABEL_1"]')
    splits = TASKS["semantic"].find_splits(tmp_path / "data", "image", fit=False)
    scores = {row["metric"]: row["value"] for row in TASKS["semantic"].evaluate_head(head, splits, 4, 0)}
    output, frame = output_of(head, photo())
    (top, left), (h, w) = (-frame.top, -frame.left), frame.input_size  # of what is left of the photo
    assert 0 < left and h <= SIZE[0] and left + w <= SIZE[1] and h * w < labels.size
    (inside,) = head.processor.post_process_semantic_segmentation(output, target_sizes=[(h, w)])
    predicted = np.full(SIZE, 2)
    predicted[top : top + h, left : left + w] = inside.numpy()
    assert scores["pixel_accuracy"] == pytest.approx((predicted == labels).mean())
    for k in (0, 1):
        iou = ((predicted == k) & (labels == k)).sum() / ((predicted == k) | (labels == k)).sum()
        assert scores[f"IoU/LABEL_{k}"] == pytest.approx(iou)


def test_a_size_in_the_recipe_scales_what_the_processor_does(tmp_path: Path) -> None:
    spec = save_teacher("mobilenet_v2_segmenter", tmp_path, "MobileNetV2ImageProcessor", CROPPED)
    head = load_published_head("t", spec.model_copy(update={"size": (130, 130)}), CPU)
    assert head is not None
    assert head.settings == {"size": {"shortest_edge": 144}, "crop_size": {"height": 130, "width": 130}}
    drawn = head.draw(photo(), SIZE)
    assert drawn.tensors["pixel_values"].shape == (3, 130, 130)
    expected = "MobileNetV2ImageProcessor: resized to shortest_edge 144 px, bilinear, center crop of 130 x 130 px"
    assert head.input_description == expected


def test_masks_of_a_padded_input_cover_the_original() -> None:
    frame = Frame(SIZE, (90, 80))
    in_input = np.zeros((1, 90, 80), dtype=bool)
    in_input[0, 50:, 10:20] = True
    boxes = np.array([[10.0, 50, 20, 90]])
    one = Detections(np.zeros(1, dtype=np.int64), np.ones(1), boxes, encode(in_input))
    found = detections_in_image(one, frame)
    assert found.masks is not None and (decode(found.masks, SIZE) == in_input[:, :60]).all()
    assert found.boxes.tolist() == [[10, 50, 20, 60]]


def test_rows_say_what_teacher_and_student_see(copied_run: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = save_teacher("segformer", tmp_path / "segformer", "SegformerImageProcessor", CROPPED)
    recipe = (copied_run / "recipe.yaml").read_text()
    lines = [f"    model: {spec.model}" if line.endswith("/segformer") else line for line in recipe.splitlines()]
    (copied_run / "recipe.yaml").write_text("\n".join(lines) + "\n")
    for folder, image in (("images", np.zeros((60, 80, 3))), ("annotations", np.eye(60, 80))):
        (tmp_path / "data" / folder / "test").mkdir(parents=True)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "data" / folder / "test/a.png")
    (tmp_path / "data/classes.json").write_text('["LABEL_0", "LABEL_1"]')
    rows = evaluate_heads(copied_run, "semantic", tmp_path / "data", ["student", "segformer"], workers=0)
    inputs = {row["model"]: row["settings"]["input"] for row in rows}
    assert inputs["student"] == "whole image resized to 32 x 32 px (h x w), bicubic"
    assert inputs["segformer"].startswith(
        "SegformerImageProcessor: resized to shortest_edge 72 px, bilinear, center crop"
    )
    shutil.rmtree(tmp_path / "segformer")
