"""Every row of the table of families, against the original model run directly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.features import Features
from shoulders.teachers import FAMILIES, Teacher, list_families, load_teacher
from shoulders.teachers.describe import flops_per_image

WriteTiny = Callable[..., Path]
Components = tuple[Tensor | None, Tensor]
Original = Callable[[Any, Tensor], dict[str, Components]]
HALF_PRECISION = {"vit", "clip", "resnet", "segformer", "d_fine", "sam"}


def to_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


def vit(encoder: str, prefix: int) -> Original:
    def run(model: Any, x: Tensor) -> dict[str, Components]:
        output = (getattr(model, encoder) if encoder else model)(x).last_hidden_state
        return {"last": (output[:, 0], output[:, prefix:])}

    return run


def deit_distilled(model: Any, x: Tensor) -> dict[str, Components]:
    tokens = model.deit(x).last_hidden_state
    return {"last": (torch.cat([tokens[:, 0], tokens[:, 1]], 1), tokens[:, 2:])}


def beit(model: Any, x: Tensor) -> dict[str, Components]:
    output = model.beit(x)
    return {"last": (output.pooler_output, output.last_hidden_state[:, 1:])}


def beit_segmenter(model: Any, x: Tensor) -> dict[str, Components]:
    hidden = model(x, output_hidden_states=True).hidden_states  # the first is before all blocks
    return {f"block{i}": (None, hidden[1 + i][:, 1:]) for i in (0, 1, 2, 3)}


def radio(model: Any, x: Tensor) -> dict[str, Components]:
    output = model(x)
    return {"last": (output.summary, output.features)}


def clip(model: Any, x: Tensor) -> dict[str, Components]:
    embeds = model.visual_projection(model.vision_model(x).pooler_output)
    return {"last": (embeds, model.vision_model(x).last_hidden_state[:, 1:])}


def siglip(model: Any, x: Tensor) -> dict[str, Components]:
    output = getattr(model, "vision_model", model)(x)
    return {"last": (output.pooler_output, output.last_hidden_state)}


def mean_of_tokens(prefix: int) -> Original:
    def run(model: Any, x: Tensor) -> dict[str, Components]:
        tokens = model.vision_model(x).last_hidden_state[:, prefix:]
        return {"last": (tokens.mean(1), tokens)}

    return run


def siglip2(model: Any, x: Tensor) -> dict[str, Components]:
    corners = [(top, left) for top in range(0, 32, 8) for left in range(0, 32, 8)]
    squares = [x[:, :, top : top + 8, left : left + 8] for top, left in corners]
    patches = torch.stack([square.movedim(1, 3).flatten(1) for square in squares], 1)  # (B, N, 8 * 8 * 3)
    shapes = torch.tensor([[4, 4]] * len(x))
    output = model.vision_model(patches, torch.ones(len(x), 16, dtype=torch.long), shapes)
    has_text = hasattr(model, "text_model")  # the classifier takes the mean
    return {"last": (output.pooler_output if has_text else output.last_hidden_state.mean(1), output.last_hidden_state)}


def pooled_stage(encoder: str) -> Original:
    def run(model: Any, x: Tensor) -> dict[str, Components]:
        output = getattr(model, encoder)(x)
        return {"stage3": (output.pooler_output.flatten(1), to_tokens(output.last_hidden_state))}

    return run


def pooled_tokens(encoder: str) -> Original:
    def run(model: Any, x: Tensor) -> dict[str, Components]:
        output = getattr(model, encoder)(x)
        return {"stage3": (output.pooler_output, output.last_hidden_state)}

    return run


def dinov3_convnext(model: Any, x: Tensor) -> dict[str, Components]:
    output = model(x)
    return {"stage3": (output.pooler_output, output.last_hidden_state[:, 1:])}


def pooled_map(encoder: str) -> Original:
    def run(model: Any, x: Tensor) -> dict[str, Components]:
        output = getattr(model, encoder)(x)
        return {"last": (output.pooler_output, to_tokens(output.last_hidden_state))}

    return run


def deeplab(model: Any, x: Tensor) -> dict[str, Components]:
    return {"last": (None, to_tokens(model.mobilenet_v2(x, output_hidden_states=True).hidden_states[-1]))}


def pvt(model: Any, x: Tensor) -> dict[str, Components]:
    return {"stage3": (None, to_tokens(model(x, output_hidden_states=True).hidden_states[-1]))}


def maps_of(get_maps: Callable[[Any, Tensor], Any], name: str = "stage") -> Original:
    def run(model: Any, x: Tensor) -> dict[str, Components]:
        return {f"{name}{i}": (None, to_tokens(maps)) for i, maps in enumerate(get_maps(model, x))}

    return run


def depth(model: Any, x: Tensor) -> dict[str, Components]:
    maps = model.backbone(x).feature_maps
    return {f"stage{i}": (tokens[:, 0], tokens[:, 1:]) for i, tokens in enumerate(maps)}


def dpt(model: Any, x: Tensor) -> dict[str, Components]:
    hidden = model(x, output_hidden_states=True).hidden_states  # the first is before all blocks
    return {f"block{i}": (hidden[1 + i][:, 0], hidden[1 + i][:, 1:]) for i in (0, 1, 3, 4)}


def sam2(model: Any, x: Tensor) -> dict[str, Components]:
    return {"level2": (None, to_tokens(model.vision_encoder(x).fpn_hidden_states[2]))}


def detr(model: Any, x: Tensor) -> dict[str, Components]:
    return {"last": (None, model(x).encoder_last_hidden_state)}


def deformable(model: Any, x: Tensor) -> dict[str, Components]:
    levels = model(x).encoder_last_hidden_state.split([64, 16, 4, 1], 1)
    return {f"level{i}": (None, level) for i, level in enumerate(levels)}


def encoder_maps(model: Any, x: Tensor) -> Any:
    return model(x).encoder_last_hidden_state


# The outputs of the original model: {tap: (summary, spatial)}.
ORIGINALS: dict[str, Original] = {
    "vit": vit("vit", 1),
    "deit": vit("deit", 2),
    "deit_distilled": deit_distilled,
    "beit": beit,
    "dinov2": vit("dinov2", 1),
    "dinov2_with_registers": vit("dinov2_with_registers", 3),
    "dinov3_vit": vit("", 3),
    "dinov3_convnext": dinov3_convnext,
    "radio": radio,
    "clip": clip,
    "clip_classifier": mean_of_tokens(1),
    "clip_vision_model": clip,
    "siglip": siglip,
    "siglip_classifier": mean_of_tokens(0),
    "siglip_vision_model": siglip,
    "siglip2": siglip2,
    "siglip2_classifier": siglip2,
    "convnext": pooled_stage("convnext"),
    "convnextv2": pooled_stage("convnextv2"),
    "resnet": pooled_stage("resnet"),
    "regnet": pooled_stage("regnet"),
    "swin": pooled_tokens("swin"),
    "swinv2": pooled_tokens("swinv2"),
    "hiera": pooled_tokens("hiera"),
    "pvt_v2": pvt,
    "mobilenet_v1": pooled_map("mobilenet_v1"),
    "mobilenet_v2": pooled_map("mobilenet_v2"),
    "efficientnet": pooled_map("efficientnet"),
    "mobilenet_v2_segmenter": deeplab,
    "beit_segmenter": beit_segmenter,
    "segformer": maps_of(lambda model, x: model(x, output_hidden_states=True).hidden_states),
    "upernet": maps_of(lambda model, x: model.backbone(x).feature_maps),
    "mask2former": maps_of(lambda model, x: model(x, output_hidden_states=True).encoder_hidden_states),
    "maskformer": maps_of(lambda model, x: model(x, output_hidden_states=True).encoder_hidden_states),
    "sam": lambda model, x: {"last": (None, to_tokens(model.vision_encoder(x).last_hidden_state))},
    "sam2": sam2,
    "sam2_video": sam2,
    "detr": detr,
    "conditional_detr": detr,
    "deformable_detr": deformable,
    "rt_detr": maps_of(encoder_maps, "level"),
    "rt_detr_v2": maps_of(encoder_maps, "level"),
    "d_fine": maps_of(encoder_maps, "level"),
    "rf_detr": lambda model, x: {"last": (None, to_tokens(model(x).backbone_features))},
    "depth_anything": depth,
    "dpt": dpt,
    "dpt_backbone": depth,
}


def assert_close(features: Features, summary: Tensor | None, spatial: Tensor) -> None:
    assert features.spatial is not None
    torch.testing.assert_close(features.spatial, spatial, atol=1e-5, rtol=1e-4)
    assert (features.summary is None) == (summary is None)
    if features.summary is not None:
        torch.testing.assert_close(features.summary, summary, atol=1e-5, rtol=1e-4)


def assert_as_declared(teacher: Teacher, features: dict[str, Features], images: int) -> None:
    assert list(features) == list(teacher.taps)
    for tap, one in features.items():
        declared = teacher.taps[tap]
        assert one.grid == declared.grid
        assert (None if one.summary is None else one.summary.shape[1]) == declared.summary
        assert (None if one.spatial is None else one.spatial.shape[2]) == declared.spatial
        for part in one.components().values():
            assert part.shape[0] == images and part.dtype == torch.float32
            assert part.isfinite().all() and not part.requires_grad
            assert part.std() > 0


def test_every_family_has_a_test() -> None:
    assert set(ORIGINALS) == set(FAMILIES)
    assert len(FAMILIES) >= 20
    assert [row["model type"] for row in list_families()] == list(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_teacher_computes_the_outputs_of_the_original_model(model_type: str, write_tiny: WriteTiny) -> None:
    folder = write_tiny(model_type, torch.float16 if model_type in HALF_PRECISION else torch.float32)
    size = {"siglip2": 32, "siglip2_classifier": 32}.get(model_type, 64 if FAMILIES[model_type].default_size else None)
    teacher = load_teacher("t", TeacherSpec(model=str(folder), size=size))
    pixels = torch.rand(2, 3, *teacher.size)
    features = teacher(pixels)
    assert_as_declared(teacher, features, images=2)

    # it stays frozen and in eval mode, and computes the same twice
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    again = teacher(pixels)
    for tap, one in features.items():
        for name, part in one.components().items():
            assert torch.equal(part, again[tap].components()[name])

    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    original = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = ORIGINALS[model_type](original, (pixels - teacher.mean) / teacher.std)
    assert set(features) == set(expected)
    for tap, (summary, spatial) in expected.items():
        assert_close(features[tap], summary, spatial)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_all_taps_at_another_size(model_type: str, write_tiny: WriteTiny) -> None:
    folder = write_tiny(model_type)
    family = FAMILIES[model_type]
    config = transformers.AutoConfig.from_pretrained(folder)
    config = getattr(config, family.image_config) if family.image_config else config
    step = 32 if family.size_multiple == 1 else family.size_step(config)
    size = None if family.fixed_size else (step * -(-64 // step), step * -(-128 // step))
    teacher = load_teacher("t", TeacherSpec(model=str(folder), size=size, taps=list(family.taps.names(config))))
    assert size is None or teacher.size == size
    assert list(teacher.taps) == list(family.taps.names(config))
    assert_as_declared(teacher, teacher(torch.rand(1, 3, *teacher.size)), images=1)
    for tap in teacher.taps.values():  # the grid has the shape of the image
        assert tap.grid[1] * teacher.size[0] == pytest.approx(tap.grid[0] * teacher.size[1], rel=0.2)
    if family.fixed_size:
        with pytest.raises(RecipeError, match=r"teachers\.t\.size: .* takes only"):
            load_teacher("t", TeacherSpec(model=str(folder), size=96))
    assert flops_per_image(teacher) > 0
