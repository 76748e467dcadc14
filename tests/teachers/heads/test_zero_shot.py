"""Zero-shot classification by a kept image-text head, against the whole model with its text tower."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import shoulders
from shoulders.config.recipe import check_recipe
from shoulders.config.sections import TeacherSpec
from shoulders.distillation import distill
from shoulders.errors import RecipeError
from shoulders.evaluation.evaluate import evaluate
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.tasks import task_of_head
from shoulders.teachers import FAMILIES, Teacher, load_teacher
from shoulders.teachers.heads import ZeroShot, check_head, load_head
from shoulders.teachers.heads.post_process import post_process
from shoulders.teachers.heads.saved import open_head, save_head
from tests.teachers.image_text import MAX_TEXT_TOKENS, NAMES, save_image_text, save_tokenizer
from tests.tiny import save_base, save_images, tiny_recipe

IMAGE_TEXT = [model_type for model_type, family in FAMILIES.items() if family.zero_shot]
SEVERAL = ["a photo of a {}.", "the {}", "{} drawing"]


def padding_of(kind: str) -> bool | str:
    spec = FAMILIES[kind].zero_shot
    assert spec is not None
    return spec.padding


def load_both(kind: str, folder: Path, prompts: list[str] | None = None) -> tuple[Any, Teacher, ZeroShot]:
    model = save_image_text(kind, folder)
    spec = TeacherSpec(model=str(folder), classes=list(NAMES), prompts=prompts, size=32 if kind == "siglip2" else None)
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    assert isinstance(head, ZeroShot)
    return model, teacher, head


def text_vectors(kind: str, folder: Path, model: Any, texts: list[str]) -> Tensor:
    tokens = hf.AutoTokenizer.from_pretrained(folder)(
        texts, padding=padding_of(kind), max_length=MAX_TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    return model.get_text_features(**tokens).pooler_output


def image_vectors(teacher: Teacher, pixels: Tensor) -> Tensor:
    summary = teacher(pixels)["last"].summary
    assert summary is not None
    return summary


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_the_head_gives_the_logits_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model, teacher, head = load_both(kind, tmp_path)
    pixels = torch.rand(3, 3, 32, 32)
    tokens = hf.AutoTokenizer.from_pretrained(tmp_path)(
        [f"a photo of a {name}." for name in NAMES],
        padding=padding_of(kind),
        max_length=MAX_TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    images = {"pixel_values": (pixels - teacher.mean) / teacher.std}
    if kind == "siglip2":
        patches = images["pixel_values"].unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        images = {
            "pixel_values": patches.reshape(3, 16, -1),
            "spatial_shapes": torch.tensor([[4, 4]] * 3),
            "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
        }
    with torch.no_grad():
        expected = model(**tokens, **images).logits_per_image
    output = head(teacher(pixels))
    assert expected.std() > 0
    assert torch.equal(output.logits, expected)
    wanted = expected.softmax(1) if kind == "clip" else expected.sigmoid()
    assert torch.equal(output.scores, wanted)
    assert sum(p.numel() for p in head.parameters()) == (1 if kind == "clip" else 2)  # no tower is left


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_several_prompts_are_averaged_as_unit_vectors(kind: str, tmp_path: Path) -> None:
    model, teacher, head = load_both(kind, tmp_path, SEVERAL)
    pixels = torch.rand(2, 3, 32, 32)
    rows = []
    for name in NAMES:
        vectors = text_vectors(kind, tmp_path, model, [prompt.format(name) for prompt in SEVERAL])
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    images = image_vectors(teacher, pixels)
    cosines = (images / images.norm(dim=1, keepdim=True)) @ torch.stack(rows).T
    expected = cosines * model.logit_scale.exp() + (0 if kind == "clip" else model.logit_bias)
    torch.testing.assert_close(head(teacher(pixels)).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_a_saved_head_is_the_same_and_has_no_tower(kind: str, tmp_path: Path) -> None:
    _, teacher, head = load_both(kind, tmp_path / "teacher")
    features = teacher(torch.rand(2, 3, 32, 32))
    save_head(head, tmp_path / "head")
    assert (tmp_path / "head" / "model.safetensors").stat().st_size < 1500
    opened = open_head(tmp_path / "head")
    assert torch.equal(opened(features).logits, head(features).logits)
    assert opened.classes == list(NAMES) and task_of_head(opened) == "classification"
    predictions = post_process(opened, opened(features), [(32, 32)] * 2)
    assert [len(one) for one in predictions] == [5, 5]
    assert all(set(one) == {"label", "score"} for one in predictions[0])
    scores = [one["score"] for one in predictions[0]]
    assert scores == sorted(scores, reverse=True)


def test_new_class_names_need_the_text_tower(tmp_path: Path) -> None:
    model, teacher, head = load_both("clip", tmp_path / "teacher")
    save_head(head, tmp_path / "head")
    opened = open_head(tmp_path / "head")
    features = teacher(torch.rand(2, 3, 32, 32))
    some = opened(features, classes=["house", "cat"])
    assert torch.equal(some.logits, head(features).logits[:, [4, 0]])
    new = opened(features, classes=["cat", "drawing"])
    assert new.classes == ("cat", "drawing") and torch.allclose(new.logits[:, 0], some.logits[:, 1])
    assert post_process(opened, new, [(32, 32)] * 2)[0][0]["label"] in ("cat", "drawing")
    shutil.rmtree(tmp_path / "teacher")
    assert torch.equal(opened(features, classes=["house", "cat"]).logits, some.logits)
    with pytest.raises(RecipeError, match=r"classes: drawing: not kept; this head keeps cat, dog, .*text tower"):
        opened(features, classes=["cat", "drawing"])


def refusal(spec: TeacherSpec) -> str:
    with pytest.raises(RecipeError) as refused:
        check_head("t", spec)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_unusable_checkpoints_are_refused_before_any_weights_are_read(tmp_path: Path) -> None:
    save_image_text("clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"")
    folder = str(tmp_path / "clip")
    check_head("t", TeacherSpec(model=folder, classes=["cat", "dog"]))
    assert refusal(TeacherSpec(model=folder)).startswith("teachers.t.classes: missing;")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "clip" / file).unlink()
    assert "has no tokenizer; add its files" in refusal(TeacherSpec(model=folder, classes=["cat", "dog"]))
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config={**vision, "image_size": 16, "patch_size": 8})
    ).save_pretrained(tmp_path / "linear")
    spec = TeacherSpec(model=str(tmp_path / "linear"), classes=["cat", "dog"])
    assert "has classes of its own" in refusal(spec)
    config = tmp_path / "linear" / "config.json"
    config.write_text(config.read_text().replace("SiglipForImageClassification", "SiglipVisionModel"))
    assert "has no text tower" in refusal(spec)
    save_tokenizer(tmp_path / "clip")
    hf.AutoModel.from_config(hf.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    spec = TeacherSpec(model=folder, classes=["unknown", "names"], size=32)
    check_head("t", spec.model_copy(update={"classes": ["cow", "mouse"]}))
    with pytest.raises(RecipeError, match="gives some of the classes cow, mouse the same embedding"):
        load_head("t", spec.model_copy(update={"classes": ["cow", "mouse"]}), load_teacher("t", spec))
    resnet = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    resnet.save_pretrained(tmp_path / "resnet")
    spec = TeacherSpec(model=str(tmp_path / "resnet"), classes=["cat", "dog"])
    assert "has classes of its own" in refusal(spec)


@pytest.mark.parametrize(
    ("teacher", "keep", "message"),
    [
        ({"classes": ["cat", "dog"]}, [], "only count with keep_heads"),
        ({"classes": ["cat", "cat"]}, ["t"], "each name once"),
        ({"classes": []}, ["t"], "classes"),
        ({"classes": ["cat"], "prompts": ["a photo"]}, ["t"], "'a photo' needs one {}"),
        ({"classes": ["cat"], "prompts": ["{} and {}"]}, ["t"], "needs one {}"),
        ({"classes": ["cat"], "prompts": ["{name}"]}, ["t"], "needs one {}"),
    ],
)
def test_recipes_are_checked(teacher: dict[str, Any], keep: list[str], message: str) -> None:
    tree = {"student": {"base": "b"}, "images": {"path": "p"}, "out": "o", "keep_heads": keep}
    with pytest.raises(RecipeError, match=message):
        check_recipe(tree | {"teachers": {"t": {"model": "m", **teacher}}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zero_shot")
    save_base(root / "base")
    for kind in ("clip", "siglip"):
        save_image_text(kind, root / kind)
    save_images(root / "labelled" / "train", 16, classes=2)
    save_images(root / "labelled" / "test", 8, classes=2)
    for split in ("train", "test"):
        for index, name in enumerate(("red", "green")):
            (root / "labelled" / split / f"class{index}").rename(root / "labelled" / split / name)
    recipe = tiny_recipe(
        root,
        student__adapter__width=4,
        teachers={
            "clip": {"model": str(root / "clip"), "classes": ["green", "red"]},
            "siglip": {"model": str(root / "siglip"), "classes": list(NAMES), "prompts": SEVERAL},
        },
        images__path=str(root / "labelled"),
        images__holdout=8,
        train__steps=2,
        train__batch=4,
        keep_heads=["clip", "siglip"],
    )
    distill(recipe)
    return root


def test_a_student_classifies_with_its_kept_class_names(run: Path) -> None:
    student = shoulders.load(run / "run")
    predictions = student.predict("siglip", torch.rand(2, 3, 32, 32))
    assert {one["label"] for one in predictions[0]} == set(NAMES)
    two = student.predict("siglip", torch.rand(2, 3, 32, 32), classes=["dog", "cat"])
    assert {one["label"] for one in two[0]} == {"dog", "cat"}


def test_evaluate_adds_zero_shot_rows_to_those_of_the_probes(run: Path) -> None:
    rows = evaluate(run / "run", "classification", run / "labelled", ["student", "clip", "siglip"], workers=0)
    zero = [row for row in rows if row["metric"] == "zero_shot_top1"]
    assert [(row["model"], row["head"]) for row in zero] == [
        ("student", "clip"),
        ("student", "siglip"),
        ("clip", "clip"),
        ("siglip", "siglip"),
    ]
    head_rows = evaluate_heads(run / "run", "classification", run / "labelled", workers=0)
    assert [row["value"] for row in zero] == [row["value"] for row in head_rows]
    assert all(row["n"] == 8 and 0 <= row["value"] <= 1 for row in zero)
    assert {row["metric"] for row in rows if row["model"] == "student"} > {"zero_shot_top1", "knn_top1"}
