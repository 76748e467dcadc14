"""Every head of the table of families, against the whole model that it is a part of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.features import Features
from shoulders.teachers import FAMILIES, Teacher, load_teacher
from shoulders.teachers.heads import check_head, load_head
from tests.teachers.conftest import NECK, RF_DETR, STAGE_NAMES, TINY, VIT, dpt_with_depth, swin

BLOCKS = VIT | {"num_hidden_layers": 4, "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3]}
HYBRID = BLOCKS | {
    "is_hybrid": True,
    "neck_ignore_stages": [0, 1],
    "backbone_featmap_shape": [1, 16, 2, 2],
    "backbone_config": {
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16],
        "depths": [1, 1, 1],
        "num_groups": 2,
        "out_features": ["stage1", "stage2", "stage3"],
        "layer_type": "bottleneck",
    },
}
WITH_HEAD = TINY | {
    # other heads and encoders of families in the table
    "dpt, hybrid": lambda: dpt_with_depth(hf.DPTConfig(**HYBRID, **NECK)),
    "dpt, classes": lambda: hf.DPTForSemanticSegmentation(hf.DPTConfig(**BLOCKS, **NECK)),
    "rf_detr, masks": lambda: hf.RfDetrForInstanceSegmentation(hf.RfDetrConfig(**RF_DETR)),
    "dpt_backbone, hierarchical": lambda: dpt_with_depth(
        hf.DPTConfig(
            backbone_config=swin(hf.Swinv2Config, out_features=STAGE_NAMES),
            **NECK | {"neck_hidden_sizes": [8, 16, 32, 64]},
        )
    ),
}
OUTPUTS = (
    "logits",
    "pred_boxes",
    "masks_queries_logits",
    "class_queries_logits",
    "predicted_depth",
    "pred_masks",
    "logits_per_image",
    "image_embeds",
)
# one rounding apart: the input of these heads has another memory layout than the output of their encoder
TOLERANCE = {"regnet": 1e-7, "upernet": 1e-7, "mobilenet_v2_segmenter": 1e-7, "beit_segmenter": 1e-7}
# the encoder's own outputs are what these are published for, or no single image has an output (sam2_video)
WITHOUT_OUTPUT = ("radio", "dinov3_vit", "dinov3_convnext", "sam2_video", "siglip_vision_model")
WITH_SPEC = [model_type for model_type, family in FAMILIES.items() if family.head]
POINTS = {"input_points": torch.tensor([[[[10.0, 12.0]]], [[[20.0, 30.0]]]])}
BOXES = {"input_boxes": torch.tensor([[[4.0, 4.0, 40.0, 50.0]], [[10.0, 2.0, 60.0, 30.0]]])}


def save_model(model_type: str, folder: Path) -> tuple[Any, TeacherSpec]:
    """A tiny frozen model with its head, and the entry of a recipe for its folder."""
    torch.manual_seed(0)
    model = WITH_HEAD[model_type]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    size = 64 if FAMILIES[model_type.split(",")[0]].default_size else None
    taps = ["level0", "level1", "level2"] if model_type == "sam2" else None
    return model.eval().requires_grad_(False), TeacherSpec(model=str(folder), size=size, taps=taps)


def tensors(output: Any) -> dict[str, Tensor]:
    return {name: output[name] for name in OUTPUTS if name in output}


@pytest.mark.parametrize("model_type", [*WITH_SPEC, "dpt, classes", "rf_detr, masks", "dpt_backbone, hierarchical"])
def test_on_the_teachers_features_a_head_gives_the_teachers_output(model_type: str, tmp_path: Path) -> None:
    model, spec = save_model(model_type, tmp_path)
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    pixels = torch.rand(2, 3, *teacher.size)
    features = teacher(pixels)
    for prompts in (POINTS, BOXES) if model_type.startswith("sam") else ({},):
        with torch.no_grad():
            whole = tensors(model(pixel_values=(pixels - teacher.mean) / teacher.std, **prompts))
        outputs = tensors(head(features, **prompts))
        assert whole
        for name, expected in whole.items():
            assert expected.std() > 0
            assert (outputs[name] - expected).abs().max() <= TOLERANCE.get(model_type, 0.0), name
    assert sum(p.numel() for p in head.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


def gradients(outputs: Iterable[Tensor], weights: list[Tensor]) -> list[float]:
    """The norm of the gradient of each weight, of a random function of the outputs."""
    torch.manual_seed(0)
    total = torch.stack([(output * torch.randn_like(output)).sum() for output in outputs]).sum()
    found = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
    return [0.0 if gradient is None else float(gradient.norm()) for gradient in found]


@pytest.mark.parametrize("model_type", [name for name in WITH_HEAD if name not in WITHOUT_OUTPUT])
def test_every_weight_behind_a_tap_moves_the_output_of_the_model(model_type: str, tmp_path: Path) -> None:
    """A weight that moves a tap alone belongs to a layer that no head reads: it may be random where it is published."""
    model, spec = save_model(model_type, tmp_path)
    teacher = load_teacher("t", spec, optimize=False).requires_grad_(True)
    pixels = torch.randn(2, 3, *teacher.size)
    outputs = tensors(run_model(model_type, model.requires_grad_(True), pixels)).values()
    taps = [x for features in teacher.module(pixels).values() for x in features.components().values()]
    names, weights = zip(*teacher.module.named_parameters(), strict=True)
    same = [next(q for q in model.parameters() if q.shape == p.shape and torch.equal(q, p)) for p in weights]
    moves_taps, moves_outputs = gradients(taps, list(weights)), gradients(outputs, same)
    assert outputs and max(moves_outputs) > 0
    floor = 1e-6 * max(moves_taps)  # rounding: a bias of attention's keys moves nothing
    unread = [name for name, a, b in zip(names, moves_taps, moves_outputs, strict=True) if a > floor and b == 0]
    assert not unread


def test_taps_that_no_head_takes_are_no_default(tmp_path: Path) -> None:
    hf.DPTForDepthEstimation(hf.DPTConfig(**HYBRID, **NECK)).save_pretrained(tmp_path / "hybrid")
    hybrid = load_teacher("t", TeacherSpec(model=str(tmp_path / "hybrid")))
    assert list(hybrid.taps) == ["block2", "block3"]  # the neck takes maps of the stem in place of the first two
    TINY["hiera"]().save_pretrained(tmp_path / "hiera")
    TINY["hiera"]().hiera.save_pretrained(tmp_path / "bare")
    classifier, bare = (load_teacher("t", TeacherSpec(model=str(tmp_path / name))) for name in ("hiera", "bare"))
    assert classifier.taps["stage3"].summary and bare.taps["stage3"].summary is None  # a norm that is not trained
    assert classifier.taps["stage3"].spatial == bare.taps["stage3"].spatial


def test_a_beit_segmenter_that_takes_the_input_of_its_blocks_is_a_teacher_without_a_head(tmp_path: Path) -> None:
    config = TINY["beit_segmenter"]().config
    config.out_indices = [1, 2, 3, 5]
    hf.BeitForSemanticSegmentation(config).save_pretrained(tmp_path)
    spec = TeacherSpec(model=str(tmp_path))
    assert list(load_teacher("t", spec).taps) == ["block0", "block1", "block3"]
    with pytest.raises(RecipeError, match="its head takes the input of the first block, which no tap holds"):
        check_head("t", spec)


def run_model(model_type: str, model: Any, pixels: Tensor) -> Any:
    """The output of a whole model for normalized pixels."""
    if model_type.startswith("siglip2"):
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        grids = torch.tensor([[pixels.shape[2] // 8, pixels.shape[3] // 8]] * len(pixels))
        images = {
            "pixel_values": patches,
            "spatial_shapes": grids,
            "pixel_attention_mask": torch.ones(patches.shape[:2]),
        }
    else:
        images = {"pixel_values": pixels}
    texts = {"input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]])} if model_type in ("clip", "siglip", "siglip2") else {}
    return model(**images, **texts, **(POINTS if model_type in ("sam", "sam2") else {}))


@pytest.mark.parametrize("model_type", ["segformer", "d_fine", "maskformer", "resnet"])
def test_a_head_depends_on_each_of_its_taps_and_on_nothing_else(model_type: str, tmp_path: Path) -> None:
    _, spec = save_model(model_type, tmp_path)
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    features = teacher(torch.rand(2, 3, *teacher.size))
    before = tensors(head(features))
    for tap in head.taps:
        changed = features | {tap: features[tap].map(lambda x: x + torch.randn_like(x))}
        after = tensors(head(changed))
        assert any((after[name] - before[name]).abs().max() > 0 for name in before), tap
    again = tensors(head(features))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_features_on_another_grid_are_resized_to_that_of_the_head(tmp_path: Path) -> None:
    _, spec = save_model("segformer", tmp_path)
    teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    flat = {
        name: Features(None, torch.randn(2, 1, tap.spatial).expand(2, 9, -1), (3, 3))  # type: ignore[arg-type]
        for name, tap in teacher.taps.items()
    }
    assert head(flat).logits.shape == (2, 2, 16, 16)


@pytest.mark.parametrize("model_type", ["vit", "deit", "beit", "convnext", "swin"])
def test_heads_at_another_size_than_the_configs(model_type: str, tmp_path: Path) -> None:
    model, spec = save_model(model_type, tmp_path)
    teacher = load_teacher("t", spec.model_copy(update={"size": (96, 64)}))
    head = load_head("t", spec.model_copy(update={"size": (96, 64)}), teacher)
    pixels = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        whole = model(pixel_values=(pixels - teacher.mean) / teacher.std, interpolate_pos_encoding=True).logits
    assert torch.equal(head(teacher(pixels)).logits, whole)


def test_checkpoints_without_a_usable_head_are_refused(tmp_path: Path) -> None:
    hf.Dinov2Model(hf.Dinov2Config(**{**VIT, "intermediate_size": None})).save_pretrained(tmp_path / "bare")
    bare = TeacherSpec(model=str(tmp_path / "bare"))
    with pytest.raises(RecipeError, match=r"teachers\.t\.model: .*no head that can be kept"):
        check_head("t", bare)
    _, spec = save_model("segformer", tmp_path / "whole")
    narrow = TeacherSpec(model=spec.model, size=64, taps=["stage3"])
    with pytest.raises(
        RecipeError, match=r"teachers\.t\.taps: the head also takes stage0, stage1, stage2; give at least taps: "
    ):
        load_head("t", narrow, load_teacher("t", narrow))
    _, spec = save_model("dpt", tmp_path / "dpt")
    with pytest.raises(RecipeError, match="its head takes square images alone, not 32 x 48 px; set size:"):
        check_head("t", TeacherSpec(model=spec.model, size=(32, 48)))
    _, spec = save_model("sam2", tmp_path / "sam2")
    with pytest.raises(RecipeError, match="its head takes images of 64 x 64 px alone; set size: 64"):
        check_head("t", spec.model_copy(update={"size": 96}))
    hf.DPTForDepthEstimation(hf.DPTConfig(**HYBRID, **NECK)).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(RecipeError, match="also takes maps of its convolutional stem"):
        check_head("t", TeacherSpec(model=str(tmp_path / "hybrid")))
    hf.SegformerForImageClassification(hf.SegformerConfig()).save_pretrained(tmp_path / "mit")
    with pytest.raises(RecipeError, match=r"saved with its head \(ForSemanticSegmentation, not SegformerForImageClass"):
        check_head("t", TeacherSpec(model=str(tmp_path / "mit")))


def test_heads_have_no_weight_of_the_encoder(tmp_path: Path) -> None:
    _, spec = save_model("rt_detr", tmp_path)
    teacher: Teacher = load_teacher("t", spec)
    head = load_head("t", spec, teacher)
    names = [name for name, _ in head.named_parameters()]
    assert not any("backbone" in name or ".model.encoder." in name for name in names)
    assert any("decoder" in name for name in names)
