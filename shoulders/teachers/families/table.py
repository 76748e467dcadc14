"""The table of the model families that can be teachers: one row each. To add a family, add a row."""

from __future__ import annotations

from functools import partial
from typing import Any

from shoulders.hub import HALF_STATS, PixelStats
from shoulders.teachers.families import tap_names
from shoulders.teachers.families.extract import (
    Extract,
    cls_and_distillation_summary,
    cls_summary,
    extract_deformable,
    extract_detr,
    extract_dinov3_convnext,
    extract_feature_maps,
    extract_feature_tokens,
    extract_final_map,
    extract_hiera,
    extract_maps,
    extract_masked_map,
    extract_pyramid,
    extract_radio,
    extract_remote,
    extract_sam,
    extract_sam2,
    extract_swin,
    extract_tokens,
    extract_tokens_with_cls,
    mean_summary,
    no_summary,
    pooled_summary,
    projected_summary,
)
from shoulders.teachers.families.forward import (
    forward_model,
    forward_patches,
    forward_pixels_only,
    forward_swinv2,
    forward_until_encoder,
    forward_with_mask,
)
from shoulders.teachers.families.inject import (
    Inject,
    inject_bare_map,
    inject_feature_maps,
    inject_feature_tokens,
    inject_fpn,
    inject_hidden_maps,
    inject_hidden_tokens,
    inject_map,
    inject_masked_map,
    inject_patch_tokens,
    inject_pooled,
    inject_pyramid,
    inject_sequence,
    inject_tokens,
)
from shoulders.teachers.families.refuse import refuse_beit, refuse_dpt, refuse_sam2
from shoulders.teachers.families.spec import Family, HeadSpec, Taps, ZeroShotSpec

CLIP_STATS: PixelStats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IDENTITY_STATS: PixelStats = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLASSES = ("ForImageClassification",)
SEMANTIC = ("ForSemanticSegmentation",)
ANY_SIZE = {"interpolate_pos_encoding": True}

_interpolate = partial(forward_model, interpolate_pos_encoding=True)
_with_hidden_states = partial(forward_model, output_hidden_states=True)
_swin = partial(
    forward_model,
    output_hidden_states=True,
    output_hidden_states_before_downsampling=True,
    interpolate_pos_encoding=True,
)
_cls_tokens = partial(extract_tokens, summary=cls_summary)
_distilled_tokens = partial(extract_tokens, summary=cls_and_distillation_summary)
_mean_tokens = partial(extract_tokens, summary=mean_summary)
_mean_tokens_after_cls = partial(extract_tokens, summary=partial(mean_summary, prefix=1))
_pooled_tokens = partial(extract_tokens, summary=pooled_summary)
_projected_tokens = partial(extract_tokens, summary=projected_summary)
_pooled_maps = partial(extract_maps, summary=pooled_summary)
_maps = partial(extract_maps, summary=no_summary)


def _vit(model_class: str, head: HeadSpec | None, **fields: Any) -> Family:
    return Family("vit", model_class, tap_names.BLOCKS, **{"extract": _cls_tokens, "head": head, **fields})


def _deit(extract: Extract) -> Family:
    head = HeadSpec("deit", inject_tokens, forward_options=ANY_SIZE)
    return _vit("DeiTModel", head, extract=extract, forward=_interpolate, model_options={"add_pooling_layer": False})


def _clip(model_class: str, **fields: Any) -> Family:
    options = {"extract": _projected_tokens, "forward": _interpolate, "pixel_stats": CLIP_STATS, **fields}
    return Family("image-text", model_class, tap_names.BLOCKS, **options)


def _siglip(model_class: str, **fields: Any) -> Family:
    options = {"extract": _pooled_tokens, "forward": _interpolate, "pixel_stats": HALF_STATS, **fields}
    return Family("image-text", model_class, tap_names.BLOCKS, **options)


def _hierarchical(model_class: str, head: HeadSpec | None, **fields: Any) -> Family:
    options = {"extract": _pooled_maps, "forward": _with_hidden_states, "size_multiple": 1, **fields}
    return Family("hierarchical", model_class, tap_names.STAGES, head=head, **options)


def _segmenter(model_class: str, taps: Taps, head: HeadSpec, **fields: Any) -> Family:
    options = {"extract": extract_feature_maps, "size_multiple": 32, "default_size": 512, **fields}
    return Family("segmenter", model_class, taps, head=head, **options)


def _sam2(model_class: str, head: HeadSpec | None) -> Family:
    options: dict[str, Any] = {"image_config": "vision_config", "encoder": "vision_encoder", "size_multiple": 32}
    return Family("segmenter", model_class, tap_names.LEVELS, extract_sam2, head=head, **options)


def _detector(model_class: str, taps: Taps, extract: Extract, inject: Inject, **fields: Any) -> Family:
    head = HeadSpec("model.encoder", inject, shape_only=("model.backbone",), class_endings=("ForObjectDetection",))
    options = {"head": head, "unused": ("decoder",), **fields}
    return Family("detector", model_class, taps, extract, forward_until_encoder, **options)


def _detr(model_class: str, taps: Taps, extract: Extract) -> Family:
    return _detector(model_class, taps, extract, inject_sequence, size_multiple=1, default_size=800)


def _rt_detr(model_class: str) -> Family:
    options = {"size_multiple": 32, "default_size": 640, "pixel_stats": IDENTITY_STATS}
    return _detector(model_class, tap_names.HYBRID_LEVELS, extract_pyramid, inject_pyramid, **options)


def _mobilenet_layers(model: str, count: int) -> tuple[str, ...]:
    """The paths of the stem and of the first layers of a MobileNet."""
    return (f"{model}.conv_stem", *(f"{model}.layer.{i}" for i in range(count)))


# Model type -> row. YOLOS and EoMT have no row: their queries are tokens of the encoder itself, so that no layer holds
# the features of the image alone.
FAMILIES: dict[str, Family] = {
    # plain ViTs: last = tokens after the final norm, summary = CLS
    "vit": _vit(
        "ViTModel",
        HeadSpec("vit", inject_tokens, forward_options=ANY_SIZE),
        forward=_interpolate,
        pixel_stats=HALF_STATS,
        model_options={"add_pooling_layer": False},
    ),
    "deit": _deit(_cls_tokens),
    "deit_distilled": _deit(_distilled_tokens),
    "beit": _vit(
        "BeitModel",
        HeadSpec("beit", inject_pooled, class_endings=CLASSES),
        extract=_pooled_tokens,
        forward=_interpolate,
        pixel_stats=HALF_STATS,
        pooled_architectures=("BeitModel", "BeitForImageClassification"),
    ),
    "dinov2": _vit("Dinov2Model", HeadSpec("dinov2", inject_tokens)),
    "dinov2_with_registers": _vit("Dinov2WithRegistersModel", HeadSpec("dinov2_with_registers", inject_tokens)),
    "dinov3_vit": _vit("DINOv3ViTModel", None),
    "radio": _vit("RadioModel", None, extract=extract_radio, pixel_stats=IDENTITY_STATS),
    # image towers: the summary is the projected vector for CLIP, the attention-pooled one for SigLIP
    "clip": _clip(
        "CLIPVisionModelWithProjection",
        image_config="vision_config",
        zero_shot=ZeroShotSpec("CLIPModel", padding=True),
    ),
    "clip_vision_model": _clip(
        "CLIPVisionModel",
        model_class_by_architecture={"CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection"},
    ),
    "siglip": _siglip(
        "SiglipVisionModel",
        image_config="vision_config",
        zero_shot=ZeroShotSpec("SiglipModel", padding="max_length"),
    ),
    "siglip_vision_model": _siglip("SiglipVisionModel"),
    "siglip2": _siglip(
        "Siglip2VisionModel",
        image_config="vision_config",
        forward=forward_patches,
        default_size=256,
        zero_shot=ZeroShotSpec("Siglip2Model", padding="max_length"),
    ),
    # image towers with a classifier, which takes the mean of the patch tokens; siglip2's takes flat patches, not pixels
    "clip_classifier": _clip(
        "CLIPVisionModel",
        extract=_mean_tokens_after_cls,
        head=HeadSpec("vision_model", inject_tokens, class_endings=CLASSES, forward_options=ANY_SIZE),
        image_config="vision_config",
    ),
    "siglip_classifier": _siglip(
        "SiglipVisionModel",
        extract=_mean_tokens,
        head=HeadSpec("vision_model", inject_tokens, class_endings=CLASSES, forward_options=ANY_SIZE),
        image_config="vision_config",
    ),
    "siglip2_classifier": _siglip(
        "Siglip2VisionModel",
        extract=_mean_tokens,
        image_config="vision_config",
        forward=forward_patches,
        default_size=256,
    ),
    # hierarchical encoders: stages, finest first; a summary on the last stage where the family has one. Heads that pool
    # start before the pooling: a student predicts the map better than its mean, because every token has a target.
    "dinov3_convnext": _hierarchical("DINOv3ConvNextModel", None, extract=extract_dinov3_convnext),
    "convnext": _hierarchical(
        "ConvNextModel",
        HeadSpec("convnext.encoder", inject_map, shape_only=("convnext.embeddings",)),
    ),
    "convnextv2": _hierarchical(
        "ConvNextV2Model",
        HeadSpec("convnextv2.encoder", inject_map, shape_only=("convnextv2.embeddings",)),
    ),
    "resnet": _hierarchical(
        "ResNetModel",
        HeadSpec("resnet.encoder", inject_map, shape_only=("resnet.embedder",)),
        default_size=224,
    ),
    "regnet": _hierarchical(
        "RegNetModel",
        HeadSpec("regnet.encoder", inject_map, shape_only=("regnet.embedder",)),
        default_size=224,
    ),
    "swin": _hierarchical(
        "SwinModel",
        HeadSpec("swin.layernorm", inject_patch_tokens, shape_only=("swin.embeddings", "swin.encoder")),
        extract=extract_swin,
        forward=_swin,
        size_multiple=32,
    ),
    "swinv2": _hierarchical(
        "Swinv2Model",
        HeadSpec("swinv2.layernorm", inject_patch_tokens, shape_only=("swinv2.embeddings", "swinv2.encoder")),
        extract=extract_swin,
        forward=forward_swinv2,
        size_multiple=32,
    ),
    "hiera": _hierarchical(
        "HieraModel",
        HeadSpec("hiera", inject_pooled),
        extract=extract_hiera,
        fixed_size=True,
        # not HieraModel: the published ones were pretrained with masks, and their pooler's norm was never trained
        pooled_architectures=("HieraForImageClassification",),
    ),
    "pvt_v2": _hierarchical("PvtV2Model", None, extract=_maps, size_multiple=32),
    "mobilenet_v1": Family(
        "hierarchical",
        "MobileNetV1Model",
        tap_names.LAST,
        extract_final_map,
        head=HeadSpec("mobilenet_v1.layer.25", inject_bare_map, shape_only=_mobilenet_layers("mobilenet_v1", 25)),
        size_multiple=1,
        pixel_stats=HALF_STATS,
    ),
    "mobilenet_v2": Family(
        "hierarchical",
        "MobileNetV2Model",
        tap_names.LAST,
        extract_final_map,
        head=HeadSpec(
            "mobilenet_v2.conv_1x1",
            inject_bare_map,
            shape_only=_mobilenet_layers("mobilenet_v2", 16),
            class_endings=CLASSES,
        ),
        size_multiple=1,
        pixel_stats=HALF_STATS,
    ),
    "efficientnet": Family(
        "hierarchical",
        "EfficientNetModel",
        tap_names.LAST,
        extract_final_map,
        head=HeadSpec("efficientnet.encoder", inject_map, shape_only=("efficientnet.embeddings",)),
        size_multiple=1,
    ),
    # segmenters: the maps that the mask head takes
    "segformer": _segmenter(
        "SegformerModel",
        tap_names.ALL_STAGES,
        HeadSpec("segformer", inject_hidden_maps, class_endings=SEMANTIC),
        extract=_maps,
        forward=_with_hidden_states,
    ),
    "beit_segmenter": Family(
        "segmenter",
        "BeitModel",
        tap_names.BEIT_BLOCKS,
        _pooled_tokens,
        _interpolate,
        HeadSpec("beit", inject_hidden_tokens, class_endings=SEMANTIC, forward_options=ANY_SIZE, refuse=refuse_beit),
        pixel_stats=HALF_STATS,
        model_options={"add_pooling_layer": False},
    ),
    # DeepLabV3 takes the map before the last convolution of the classifier, which it never uses
    "mobilenet_v2_segmenter": Family(
        "segmenter",
        "MobileNetV2Model",
        tap_names.LAST,
        extract_final_map,
        head=HeadSpec(
            "mobilenet_v2.layer.15",
            inject_bare_map,
            shape_only=(*_mobilenet_layers("mobilenet_v2", 15), "mobilenet_v2.conv_1x1"),
            class_endings=SEMANTIC,
        ),
        unused=("conv_1x1",),
        size_multiple=1,
        pixel_stats=HALF_STATS,
        model_options={"add_pooling_layer": False},
    ),
    "upernet": _segmenter(
        "UperNetForSemanticSegmentation",
        tap_names.BACKBONE_OUTPUTS,
        HeadSpec("backbone", inject_feature_maps),
        encoder="backbone",
    ),
    "mask2former": _segmenter(
        "Mask2FormerModel",
        tap_names.BACKBONE_OUTPUTS,
        HeadSpec("model.pixel_level_module.encoder", inject_feature_maps, requires="scipy"),
        encoder="pixel_level_module.encoder",
    ),
    "maskformer": _segmenter(
        "MaskFormerModel",
        tap_names.BACKBONE_STAGES,
        HeadSpec("model.pixel_level_module.encoder", inject_feature_maps, requires="scipy"),
        encoder="pixel_level_module.encoder",
    ),
    "sam": Family(
        "segmenter",
        "SamVisionModel",
        tap_names.BLOCKS,
        extract_sam,
        head=HeadSpec("vision_encoder", inject_map),
        image_config="vision_config",
        fixed_size=True,
    ),
    "sam2": _sam2("Sam2Model", HeadSpec("vision_encoder", inject_fpn, refuse=refuse_sam2)),
    "sam2_video": _sam2("Sam2VideoModel", None),
    # detectors: what the decoder takes
    "detr": _detr("DetrModel", tap_names.LAST, extract_detr),
    "conditional_detr": _detr("ConditionalDetrModel", tap_names.LAST, extract_detr),
    "deformable_detr": _detr("DeformableDetrModel", tap_names.ALL_LEVELS, extract_deformable),
    "rt_detr": _rt_detr("RTDetrModel"),
    "rt_detr_v2": _rt_detr("RTDetrV2Model"),
    "d_fine": _rt_detr("DFineModel"),
    "rf_detr": Family(
        "detector",
        "RfDetrModel",
        tap_names.LAST,
        extract_masked_map,
        forward_with_mask,
        HeadSpec(
            "model.backbone",
            inject_masked_map,
            encoder_by_class={"RfDetrForInstanceSegmentation": "model.model.backbone"},
        ),
        image_config="backbone_config",
        encoder="backbone",
        size_multiple="window",
    ),
    # depth: the tokens that the neck takes, with CLS
    "depth_anything": Family(
        "depth",
        "DepthAnythingForDepthEstimation",
        tap_names.BACKBONE_OUTPUTS,
        extract_feature_tokens,
        head=HeadSpec("backbone", inject_feature_tokens),
        encoder="backbone",
    ),
    "dpt": Family(
        "depth",
        "DPTModel",
        tap_names.DPT_BLOCKS,
        extract_tokens_with_cls,
        head=HeadSpec("dpt", inject_hidden_tokens, refuse=refuse_dpt),
        pixel_stats=HALF_STATS,
        model_options={"add_pooling_layer": False},
    ),
    "dpt_backbone": Family(
        "depth",
        "DPTForDepthEstimation",
        tap_names.OUTPUTS,
        extract_feature_tokens,
        head=HeadSpec("backbone", inject_feature_tokens),
        image_config="backbone_config",
        encoder="backbone",
    ),
}

# A model with code of its own: called with pixels alone; its tokens end with the patch tokens.
REMOTE = Family("remote code", "AutoModel", tap_names.LAST, extract_remote, forward_pixels_only)
