"""Where the head of each family begins, and how features are put in place of its encoder's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoulders.features import Features

Taps = Mapping[str, Features]
Write = Callable[[Taps, Any], Any]


@dataclass(frozen=True)
class HeadSpec:
    """Where the head of a family begins.

    Args:
        encoder: path, in the model with its head, of the submodule whose answer is replaced.
        write: (the taps that the head reads, finest first; the submodule's answer to blank pixels) -> its answer.
        silent: submodules before it, of whose answers only the shapes matter.
        elsewhere: paths of the encoder in models of other classes of the family.
        refusal: (config, size in px) -> why the head cannot be cut off such a checkpoint, or "".
        needs: a package without which the head cannot be built.
        call: arguments with which the whole model takes images of any size.
        heads: how the names of the classes end whose heads read this; empty: all of the family.
    """

    encoder: str
    write: Write
    silent: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    refusal: Callable[[Any, tuple[int, int]], str] = lambda config, size: ""
    heads: tuple[str, ...] = ()
    needs: str = ""
    call: Mapping[str, Any] = field(default_factory=dict)

    def encoder_of(self, model: Any) -> str:
        """The path of the encoder in a model."""
        return self.elsewhere.get(type(model).__name__, self.encoder)


def write_pooled(taps: Taps, blank: Any) -> Any:
    """A summary alone is read, in whatever shape the family gives it."""
    summary = _last(taps).components()["summary"]
    return _changed(blank, pooler_output=summary.view(len(summary), *blank.pooler_output.shape[1:]))


def write_tokens(taps: Taps, blank: Any) -> Any:
    """(B, P + N, C): CLS first, patch tokens last; tokens between them, which no head reads, stay blank."""
    parts, tokens = _last(taps).components(), blank.last_hidden_state.clone()
    tokens[:, 0] = parts["summary"]
    if "spatial" in parts:
        tokens[:, -parts["spatial"].shape[1] :] = parts["spatial"]
    return _changed(blank, last_hidden_state=tokens)


def write_hidden_maps(taps: Taps, blank: Any) -> Any:
    """Maps (B, C, H, W) as hidden states."""
    return _changed(blank, hidden_states=_maps(taps.values(), blank.hidden_states))


def write_hidden_tokens(taps: Taps, blank: Any) -> Any:
    """(B, 1 + N, C) after the blocks that are read, as hidden states, of which the first is before all blocks."""
    hidden = list(blank.hidden_states)
    for tap, features in taps.items():
        hidden[1 + int(tap.removeprefix("block"))] = _with_summary(features)
    return _changed(blank, hidden_states=tuple(hidden))


def write_feature_maps(taps: Taps, blank: Any) -> Any:
    """Maps (B, C, H, W) as a backbone gives them."""
    return _changed(blank, feature_maps=_maps(taps.values(), blank.feature_maps))


def write_feature_tokens(taps: Taps, blank: Any) -> Any:
    """(B, 1 + N, C) as a ViT backbone gives them; maps where a hierarchical one does."""
    if blank.feature_maps[0].ndim == 4:
        return write_feature_maps(taps, blank)
    return _changed(blank, feature_maps=tuple(_with_summary(features) for features in taps.values()))


def write_sequence(taps: Taps, blank: Any) -> Any:
    """All places of all levels in one sequence (B, N, C), finest level first."""
    return _changed(blank, last_hidden_state=torch.cat([tap.components()["spatial"] for tap in taps.values()], 1))


def write_pyramid(taps: Taps, blank: Any) -> Any:
    """A list of maps (B, C, H, W)."""
    return _changed(blank, last_hidden_state=list(_maps(taps.values(), blank.last_hidden_state)))


def write_map(taps: Taps, blank: Any) -> Any:
    """One map (B, C, H, W)."""
    return _changed(blank, last_hidden_state=_maps([_last(taps)], [blank.last_hidden_state])[0])


def write_places(taps: Taps, blank: Any) -> Any:
    """The places (B, N, C) alone."""
    return _last(taps).components()["spatial"]


def write_masked_map(taps: Taps, blank: Any) -> Any:
    """One map (B, C, H, W), and the mask of where it is image."""
    return _maps([_last(taps)], blank[:1])[0], blank[1]


def write_fpn(taps: Taps, blank: Any) -> Any:
    """The pyramid of SAM 2, whose position encodings depend on the shapes alone."""
    return _changed(blank, fpn_hidden_states=_maps(taps.values(), blank.fpn_hidden_states))


def _last(taps: Taps) -> Features:
    return list(taps.values())[-1]


def _changed(blank: Any, **fields: Any) -> Any:
    """The answer to blank images with some of its fields replaced."""
    return type(blank)(**{**blank, **fields})


def _with_summary(features: Features) -> Tensor:
    """(B, 1 + N, C), the summary first."""
    parts = features.components()
    return torch.cat([parts["summary"][:, None], parts["spatial"]], 1)


def _maps(taps: Iterable[Features], blank: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Maps (B, C, H, W) laid out in memory like the encoder's own: another layout rounds differently."""
    maps = []
    for tap, like in zip(taps, blank, strict=True):
        one = like[:1]  # of many they are one and the same, at a stride of 0
        last = one.is_contiguous(memory_format=torch.channels_last) and not one.is_contiguous()
        maps.append(tap.to_map().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))
    return tuple(maps)


def _detector(write: Write) -> HeadSpec:
    return HeadSpec("model.encoder", write, silent=("model.backbone",), heads=("ForObjectDetection",))


def _refuse_dpt(config: Any, size: tuple[int, int]) -> str:
    if config.is_hybrid:
        return "the head of a hybrid DPT also reads its convolutional stem, which no tap carries"
    # without a backbone_config the neck takes the square root of the number of places
    return "" if size[0] == size[1] else f"its head takes square images alone, not {size[0]} x {size[1]} px; set size:"


def _refuse_sam2(config: Any, size: tuple[int, int]) -> str:
    side = config.prompt_encoder_config.image_size
    return "" if size == (side, side) else f"its head takes images of {side} x {side} px alone; set size: {side}"


CLASSES = ("ForImageClassification",)
ANY_SIZE = {"interpolate_pos_encoding": True}
# transformers builds their loss with them
_PIXEL_ENCODER = HeadSpec("model.pixel_level_module.encoder", write_feature_maps, needs="scipy")

# row of the table of families -> where to cut.
# YOLOS, EoMT: queries are tokens of the encoder itself, there is no place to cut.
HEADS: dict[str, HeadSpec] = {
    "vit": HeadSpec("vit", write_tokens, call=ANY_SIZE),
    "deit": HeadSpec("deit", write_tokens, call=ANY_SIZE),
    "beit": HeadSpec("beit", write_pooled, heads=CLASSES),
    "dinov2": HeadSpec("dinov2", write_tokens),
    "dinov2_with_registers": HeadSpec("dinov2_with_registers", write_tokens),
    # before the pooling: a student tells the map better than its mean, for it has a target at each place
    "resnet": HeadSpec("resnet.encoder", write_map, silent=("resnet.embedder",)),
    "regnet": HeadSpec("regnet.encoder", write_map, silent=("regnet.embedder",)),
    "convnext": HeadSpec("convnext.encoder", write_map, silent=("convnext.embeddings",)),
    "convnextv2": HeadSpec("convnextv2.encoder", write_map, silent=("convnextv2.embeddings",)),
    "swin": HeadSpec("swin.layernorm", write_places, silent=("swin.embeddings", "swin.encoder")),
    "swinv2": HeadSpec("swinv2.layernorm", write_places, silent=("swinv2.embeddings", "swinv2.encoder")),
    "hiera": HeadSpec("hiera", write_pooled),
    "mobilenet_v2": HeadSpec("mobilenet_v2", write_pooled, heads=CLASSES),
    "segformer": HeadSpec("segformer", write_hidden_maps, heads=("ForSemanticSegmentation",)),
    "upernet": HeadSpec("backbone", write_feature_maps),
    "mask2former": _PIXEL_ENCODER,
    "maskformer": _PIXEL_ENCODER,
    "sam": HeadSpec("vision_encoder", write_map),
    "sam2": HeadSpec("vision_encoder", write_fpn, refusal=_refuse_sam2),
    "detr": _detector(write_sequence),
    "conditional_detr": _detector(write_sequence),
    "deformable_detr": _detector(write_sequence),
    "rt_detr": _detector(write_pyramid),
    "rt_detr_v2": _detector(write_pyramid),
    "d_fine": _detector(write_pyramid),
    "rf_detr": HeadSpec(
        "model.backbone", write_masked_map, elsewhere={"RfDetrForInstanceSegmentation": "model.model.backbone"}
    ),
    "depth_anything": HeadSpec("backbone", write_feature_tokens),
    "dpt": HeadSpec("dpt", write_hidden_tokens, refusal=_refuse_dpt),
    "dpt_backbone": HeadSpec("backbone", write_feature_tokens),
}
