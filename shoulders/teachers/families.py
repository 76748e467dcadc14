"""The table of model families that can teach: one row each, data and a few shared functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from shoulders.hub import HALF, IMAGENET, PixelStats
from shoulders.teachers import extract

CLIP: PixelStats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RAW: PixelStats = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Taps:
    """The names of a family's taps, from its config alone; the last name is the deepest.

    Args:
        text: the names in general, for tables.
        names: config -> names.
        default: the taps used when a recipe names none: the ``last`` of the names, ``all``, or those of the ``head``.
        head: config -> the taps that a task head reads, where they are not simply the last one or all.
    """

    text: str
    names: Callable[[Any], tuple[str, ...]]
    default: Literal["last", "all", "head"] = "last"
    head: Callable[[Any], tuple[str, ...]] | None = None

    def chosen(self, config: Any) -> tuple[str, ...]:
        """The default taps for this config."""
        return {"last": self.names(config)[-1:], "all": self.names(config), "head": self.of_head(config)}[self.default]

    def of_head(self, config: Any) -> tuple[str, ...]:
        """The taps that a task head extract."""
        if self.head is not None:
            return self.head(config)
        return self.names(config) if self.default == "all" else self.names(config)[-1:]


@dataclass(frozen=True)
class Family:
    """How one model type of transformers is loaded, asked and read.

    Args:
        kind: what sort of model it is, for tables.
        model: the transformers class that holds the encoder.
        taps: its taps.
        read: its output -> ``{tap: Features}``.
        call: how it is asked.
        model_by_architecture: other classes, by what the checkpoint was saved as.
        part: attribute of the config that describes the image tower, where the config holds more.
        encoder: path in ``model`` of the submodule that takes the pixels; "" for all of it.
        unused: submodules that never run here and are dropped.
        multiple: sizes must be divisible by this many px; "patch" for the config's patch size, "window" for that
            times the windows of a side.
        fixed: the size is the config's and no other.
        size: default size in px where the checkpoint does not say; default: the config's.
        stats: default mean and std.
        pooled: what checkpoints with a pooling layer were saved as; others are built without; empty: it is not asked.
        options: extra arguments of the model's constructor.
    """

    kind: str
    model: str
    taps: Taps
    read: extract.Read
    call: extract.Call = extract.ask
    model_by_architecture: Mapping[str, str] = field(default_factory=dict)
    part: str = ""
    encoder: str = ""
    unused: tuple[str, ...] = ()
    multiple: int | Literal["patch", "window"] = "patch"
    fixed: bool = False
    size: int | None = None
    stats: PixelStats = IMAGENET
    pooled: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def step(self, config: Any) -> int:
        """Sizes must be divisible by this many px."""
        if isinstance(self.multiple, int):
            return self.multiple
        return extract.patch_size(config) * (config.num_windows if self.multiple == "window" else 1)

    @property
    def size_rule(self) -> str:
        """The sizes allowed, in words."""
        if self.fixed:
            return "the config's image size"
        words = {"patch": "multiples of the patch size", "window": "multiples of patch size x windows", 1: "any"}
        return words.get(self.multiple, f"multiples of {self.multiple}")


def _blocks(config: Any) -> tuple[str, ...]:
    return (*(f"block{i}" for i in range(config.num_hidden_layers)), "last")


def _stages(config: Any) -> tuple[str, ...]:
    return tuple(f"stage{i}" for i in range(len(config.depths)))


def _backbone_maps(config: Any) -> tuple[str, ...]:
    return tuple(f"stage{i}" for i in range(len(config.backbone_config.out_features)))


def _outputs(config: Any) -> tuple[str, ...]:
    return tuple(f"stage{i}" for i in range(len(config.out_features)))


def _dpt_blocks(config: Any) -> tuple[str, ...]:
    return tuple(f"block{i}" for i in sorted(config.backbone_out_indices))


def _backbone_stages(config: Any) -> tuple[str, ...]:
    return _stages(config.backbone_config)


def _levels(config: Any) -> tuple[str, ...]:
    return tuple(f"level{i}" for i in range(config.num_feature_levels))


def _hybrid_levels(config: Any) -> tuple[str, ...]:
    return tuple(f"level{i}" for i in range(len(config.encoder_in_channels)))


PLAIN = Taps("block0..blockN-1, last", _blocks)
STAGES = Taps("stage0..stageN-1", _stages)
ALL_STAGES = Taps("stage0..stageN-1", _stages, "all")
BACKBONE_MAPS = Taps("stage0..stageN-1 (the backbone's outputs)", _backbone_maps, "all")
BACKBONE_STAGES = Taps("stage0..stageN-1 (the backbone's stages)", _backbone_stages, "all")
FINAL = Taps("last", lambda config: ("last",))
FPN = Taps("level0..levelN-1", _levels, head=_levels)
ALL_LEVELS = Taps("level0..levelN-1", _levels, "all")
HYBRID = Taps("level0..levelN-1", _hybrid_levels, "all")
OUTPUTS = Taps("stage0..stageN-1 (the backbone's outputs)", _outputs, "all")
DPT_BLOCKS = Taps("block0..blockN-1, last", _blocks, "head", _dpt_blocks)

_interpolate = partial(extract.ask, interpolate_pos_encoding=True)
_cls = partial(extract.read_tokens, summary=extract.cls_token)
_pooled = partial(extract.read_tokens, summary=extract.pooled)
_projected = partial(extract.read_tokens, summary=extract.projected)
_maps = partial(extract.read_maps, summary=extract.pooled)
_maps_alone = partial(extract.read_maps, summary=extract.no_summary)
_staged = partial(extract.ask, output_hidden_states=True)
_swin = partial(
    extract.ask,
    output_hidden_states=True,
    output_hidden_states_before_downsampling=True,
    interpolate_pos_encoding=True,
)


def _vit(model: str, **fields: Any) -> Family:
    return Family("vit", model, PLAIN, **{"read": _cls, **fields})


def _staged_encoder(model: str, **fields: Any) -> Family:
    return Family("hierarchical", model, STAGES, **{"read": _maps, "call": _staged, "multiple": 1, **fields})


def _clip(model: str, architectures: Mapping[str, str], **fields: Any) -> Family:
    return Family("image-text", model, PLAIN, _projected, _interpolate, architectures, stats=CLIP, **fields)


def _siglip(model: str, **fields: Any) -> Family:
    return Family("image-text", model, PLAIN, _pooled, **{"call": _interpolate, "stats": HALF, **fields})


def _detector(model: str, taps: Taps, read: extract.Read, **fields: Any) -> Family:
    return Family("detector", model, taps, read, extract.ask_until_encoder, unused=("decoder",), **fields)


def _sam2(model: str) -> Family:
    return Family(
        "segmenter", model, FPN, extract.read_sam2, part="vision_config", encoder="vision_encoder", multiple=32
    )


FAMILIES: dict[str, Family] = {
    # plain ViTs: last = tokens after the final norm, summary = CLS
    "vit": _vit("ViTModel", call=_interpolate, stats=HALF, options={"add_pooling_layer": False}),
    "deit": _vit("DeiTModel", call=_interpolate, options={"add_pooling_layer": False}),
    "beit": _vit(
        "BeitModel",
        call=_interpolate,
        read=_pooled,
        stats=HALF,
        pooled=("BeitModel", "BeitForImageClassification"),
    ),
    "dinov2": _vit("Dinov2Model"),
    "dinov2_with_registers": _vit("Dinov2WithRegistersModel"),
    "dinov3_vit": _vit("DINOv3ViTModel"),
    "radio": _vit("RadioModel", read=extract.read_radio, stats=RAW),
    # image towers: the summary is the projected vector for CLIP, the attention-pooled one for SigLIP
    "clip": _clip(
        "CLIPVisionModelWithProjection",
        {"CLIPForImageClassification": "CLIPVisionModel"},
        part="vision_config",
    ),
    "clip_vision_model": _clip(
        "CLIPVisionModel",
        {"CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection"},
    ),
    "siglip": _siglip("SiglipVisionModel", part="vision_config"),
    "siglip_vision_model": _siglip("SiglipVisionModel"),
    "siglip2": _siglip("Siglip2VisionModel", part="vision_config", call=extract.ask_in_patches, size=256),
    # hierarchical encoders: stages, finest first; a summary on the last stage where the family has one
    "dinov3_convnext": _staged_encoder("DINOv3ConvNextModel", read=extract.read_dinov3_convnext),
    "convnext": _staged_encoder("ConvNextModel"),
    "convnextv2": _staged_encoder("ConvNextV2Model"),
    "resnet": _staged_encoder("ResNetModel", size=224),
    "regnet": _staged_encoder("RegNetModel", size=224),
    "swin": _staged_encoder("SwinModel", call=_swin, read=extract.read_swin, multiple=32),
    "swinv2": _staged_encoder("Swinv2Model", call=extract.ask_swinv2, read=extract.read_swin, multiple=32),
    "hiera": _staged_encoder(
        "HieraModel",
        read=extract.read_hiera,
        fixed=True,
        pooled=("HieraModel", "HieraForImageClassification"),
    ),
    "pvt_v2": _staged_encoder("PvtV2Model", read=_maps_alone, multiple=32),
    "mobilenet_v2": Family("hierarchical", "MobileNetV2Model", FINAL, extract.read_final_map, multiple=1, stats=HALF),
    # segmenters: the maps that the mask head reads
    "segformer": Family(
        "segmenter",
        "SegformerModel",
        ALL_STAGES,
        _maps_alone,
        _staged,
        multiple=32,
        size=512,
    ),
    "upernet": Family(
        "segmenter",
        "UperNetForSemanticSegmentation",
        BACKBONE_MAPS,
        extract.read_feature_maps,
        encoder="backbone",
        multiple=32,
        size=512,
    ),
    "mask2former": Family(
        "segmenter",
        "Mask2FormerModel",
        BACKBONE_MAPS,
        extract.read_feature_maps,
        encoder="pixel_level_module.encoder",
        multiple=32,
        size=512,
    ),
    "maskformer": Family(
        "segmenter",
        "MaskFormerModel",
        BACKBONE_STAGES,
        extract.read_feature_maps,
        encoder="pixel_level_module.encoder",
        multiple=32,
        size=512,
    ),
    "sam": Family("segmenter", "SamVisionModel", PLAIN, extract.read_sam, part="vision_config", fixed=True),
    "sam2": _sam2("Sam2Model"),
    "sam2_video": _sam2("Sam2VideoModel"),
    # detectors: what the decoder reads
    "detr": _detector("DetrModel", FINAL, extract.read_detr, multiple=1, size=800),
    "conditional_detr": _detector("ConditionalDetrModel", FINAL, extract.read_detr, multiple=1, size=800),
    "deformable_detr": _detector(
        "DeformableDetrModel",
        ALL_LEVELS,
        extract.read_deformable,
        multiple=1,
        size=800,
    ),
    "rt_detr": _detector("RTDetrModel", HYBRID, extract.read_pyramid, multiple=32, size=640, stats=RAW),
    "rt_detr_v2": _detector("RTDetrV2Model", HYBRID, extract.read_pyramid, multiple=32, size=640, stats=RAW),
    "d_fine": _detector("DFineModel", HYBRID, extract.read_pyramid, multiple=32, size=640, stats=RAW),
    "rf_detr": Family(
        "detector",
        "RfDetrModel",
        FINAL,
        extract.read_masked_map,
        extract.ask_masked,
        part="backbone_config",
        encoder="backbone",
        multiple="window",
    ),
    # depth: the tokens that the neck reads, with CLS
    "depth_anything": Family(
        "depth",
        "DepthAnythingForDepthEstimation",
        BACKBONE_MAPS,
        extract.read_feature_tokens,
        encoder="backbone",
    ),
    "dpt": Family(
        "depth",
        "DPTModel",
        DPT_BLOCKS,
        extract.read_tokens_with_cls,
        stats=HALF,
        options={"add_pooling_layer": False},
    ),
    "dpt_backbone": Family(
        "depth",
        "DPTForDepthEstimation",
        OUTPUTS,
        extract.read_feature_tokens,
        part="backbone_config",
        encoder="backbone",
    ),
}

# A model that brings its own code: asked plainly, and read as tokens with any prefix before the patches.
REMOTE = Family("remote code", "AutoModel", FINAL, extract.read_remote, extract.ask_plainly)


def row_of(tree: Mapping[str, Any]) -> str:
    """The row of the table for a config.json: its model type, or that with ``_backbone`` where it has a row for them.

    A DPT is either a ViT of its own, or has a backbone of another type.
    """
    model_type = str(tree.get("model_type"))
    with_backbone = f"{model_type}_backbone"
    is_one = with_backbone in FAMILIES and tree.get("backbone_config") and not tree.get("is_hybrid")
    return with_backbone if is_one else model_type


def list_families() -> list[dict[str, str]]:
    """The table in words, one row per model type: kind, taps, default taps, size rule."""
    return [
        {
            "model type": model_type,
            "kind": family.kind,
            "taps": family.taps.text,
            "default": {"last": "the last one", "all": "all", "head": "those of its head"}[family.taps.default],
            "size": family.size_rule,
        }
        for model_type, family in FAMILIES.items()
    ]
