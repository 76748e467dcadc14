"""A tiny random model of every supported family, with its task head where transformers has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.utils import logging

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP2 = {**{key: value for key, value in VIT.items() if key != "image_size"}, "num_patches": 16}
DINO = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
NARROW = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1]}
STAGE_NAMES = ["stage1", "stage2", "stage3", "stage4"]
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
RT_DETR = {
    "encoder_hidden_dim": 16,
    "d_model": 16,
    "encoder_in_channels": [12, 16, 20],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_denoising": 2,
    "hidden_expansion": 0.5,
}
RF_DETR = {
    "backbone_config": {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_windows": 2,
        "out_features": ["stage2", "stage3"],
    },
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "group_detr": 2,
    "c2f_num_blocks": 1,
    "intermediate_size": 16,
}
SAM_HEADS = {
    "prompt_encoder_config": {
        "hidden_size": 16,
        "image_size": 64,
        "patch_size": 16,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    },
}
SAM2_VISION = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "window_positional_embedding_background_size": [2, 2],
        "global_attention_blocks": [4],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "fpn_hidden_size": 16,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}


def swin(config: type = hf.SwinConfig, **more: Any) -> Any:
    return config(image_size=64, embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, **more)


def resnet(*outputs: str) -> Any:
    return hf.ResNetConfig(embedding_size=8, layer_type="basic", out_features=list(outputs), **STAGES)


def rt_resnet() -> Any:
    return hf.RTDetrResNetConfig(embedding_size=8, layer_type="basic", out_features=STAGE_NAMES[1:], **STAGES)


def depth_backbone() -> Any:
    return hf.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )


def dpt_with_depth(config: Any) -> Any:
    """A DPT whose depth is not 0 everywhere, as that of a random head may be: its last layer is a ReLU."""
    model = hf.DPTForDepthEstimation(config)
    model.head.head[-2].bias.data.fill_(1)
    return model


MASKS = {"mask_feature_size": 32, "num_queries": 5, "dim_feedforward": 16, "encoder_feedforward_dim": 16}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}

TINY: dict[str, Callable[[], Any]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT)),
    "deit_distilled": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT, use_relative_position_bias=True)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO)),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=2)
    ),
    "dinov3_vit": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "dinov3_convnext": lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(image_size=64, **STAGES)),
    "radio": lambda: hf.RadioModel(hf.RadioConfig(**{**VIT, "mlp_ratio": 2.0}, num_registers=2, max_img_size=128)),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(vision_config={**VIT, "projection_dim": 12}, text_config=TEXT, projection_dim=12)
    ),
    "clip_classifier": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=VIT, text_config=TEXT)),
    "clip_vision_model": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VIT, projection_dim=12)),
    "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=VIT, text_config=TEXT)),
    "siglip_classifier": lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=VIT, text_config=TEXT)),
    "siglip_vision_model": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)),
    "siglip2": lambda: hf.Siglip2Model(hf.Siglip2Config(vision_config=SIGLIP2, text_config=TEXT)),
    "siglip2_classifier": lambda: hf.Siglip2ForImageClassification(
        hf.Siglip2Config(vision_config=SIGLIP2, text_config=TEXT)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(image_size=64, **STAGES)),
    "convnextv2": lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(image_size=64, **STAGES)),
    "resnet": lambda: hf.ResNetForImageClassification(resnet("stage4")),
    "regnet": lambda: hf.RegNetForImageClassification(hf.RegNetConfig(embedding_size=8, groups_width=4, **STAGES)),
    "swin": lambda: hf.SwinForImageClassification(swin()),
    "swinv2": lambda: hf.Swinv2ForImageClassification(swin(hf.Swinv2Config)),
    "hiera": lambda: hf.HieraForImageClassification(
        hf.HieraConfig(embed_dim=8, image_size=[64, 64], depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2])
    ),
    "pvt_v2": lambda: hf.PvtV2ForImageClassification(
        hf.PvtV2Config(num_attention_heads=[1, 1, 2, 2], image_size=64, **NARROW)
    ),
    "mobilenet_v1": lambda: hf.MobileNetV1ForImageClassification(
        hf.MobileNetV1Config(depth_multiplier=0.25, image_size=64)
    ),
    "efficientnet": lambda: hf.EfficientNetForImageClassification(
        hf.EfficientNetConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320)
    ),
    "beit_segmenter": lambda: hf.BeitForSemanticSegmentation(
        hf.BeitConfig(
            **VIT | {"num_hidden_layers": 5, "patch_size": 16, "image_size": 64},
            use_relative_position_bias=True,
            out_indices=[2, 3, 4, 5],
            pool_scales=[1, 2],
            auxiliary_channels=8,
        )
    ),
    "mobilenet_v2_segmenter": lambda: hf.MobileNetV2ForSemanticSegmentation(
        hf.MobileNetV2Config(depth_multiplier=0.25, image_size=64, output_stride=8)
    ),
    "mobilenet_v2": lambda: hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(depth_multiplier=0.25, image_size=64, finegrained_output=False)
    ),
    "segformer": lambda: hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8, **NARROW)
    ),
    "upernet": lambda: hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=swin(out_features=STAGE_NAMES),
            hidden_size=8,
            auxiliary_channels=8,
            auxiliary_in_channels=32,
        )
    ),
    "mask2former": lambda: hf.Mask2FormerForUniversalSegmentation(
        hf.Mask2FormerConfig(
            backbone_config=swin(out_features=STAGE_NAMES),
            hidden_dim=32,
            feature_size=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            **MASKS,
        )
    ),
    "maskformer": lambda: hf.MaskFormerForInstanceSegmentation(
        hf.MaskFormerConfig(
            backbone_config=swin(),
            decoder_config=hf.DetrConfig(backbone_config=resnet("stage4"), **DETR),
            fpn_feature_size=32,
            mask_feature_size=32,
        )
    ),
    "sam": lambda: hf.SamModel(
        hf.SamConfig(
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "output_channels": 16,
                "image_size": 64,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
                "num_pos_feats": 8,
            },
            **SAM_HEADS,
        )
    ),
    "sam2": lambda: hf.Sam2Model(hf.Sam2Config(vision_config=SAM2_VISION, **SAM_HEADS)),
    "sam2_video": lambda: hf.Sam2VideoModel(
        hf.Sam2VideoConfig(
            vision_config=SAM2_VISION,
            image_size=64,
            memory_attention_hidden_size=16,
            memory_attention_num_layers=1,
            memory_attention_feed_forward_hidden_size=16,
            memory_attention_rope_feat_sizes=[4, 4],
            memory_encoder_hidden_size=16,
            memory_encoder_output_channels=8,
            memory_fuser_embed_dim=16,
            memory_fuser_intermediate_dim=16,
            mask_downsampler_embed_dim=16,
            **SAM_HEADS,
        )
    ),
    "detr": lambda: hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=resnet("stage4"), **DETR)),
    "conditional_detr": lambda: hf.ConditionalDetrForObjectDetection(
        hf.ConditionalDetrConfig(backbone_config=resnet("stage4"), **DETR)
    ),
    "deformable_detr": lambda: hf.DeformableDetrForObjectDetection(
        hf.DeformableDetrConfig(
            backbone_config=resnet(*STAGE_NAMES[1:]),
            two_stage=True,
            with_box_refine=True,
            two_stage_num_proposals=5,
            **{**DETR, "d_model": 64},
        )
    ),
    "rt_detr": lambda: hf.RTDetrForObjectDetection(hf.RTDetrConfig(backbone_config=rt_resnet(), **RT_DETR)),
    "rt_detr_v2": lambda: hf.RTDetrV2ForObjectDetection(hf.RTDetrV2Config(backbone_config=rt_resnet(), **RT_DETR)),
    "d_fine": lambda: hf.DFineForObjectDetection(hf.DFineConfig(backbone_config=rt_resnet(), **RT_DETR)),
    "rf_detr": lambda: hf.RfDetrForObjectDetection(hf.RfDetrConfig(**RF_DETR)),
    "depth_anything": lambda: hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(backbone_config=depth_backbone(), reassemble_hidden_size=16, head_hidden_size=4, **NECK)
    ),
    "dpt": lambda: dpt_with_depth(
        hf.DPTConfig(**{**VIT, "num_hidden_layers": 5, "patch_size": 16}, backbone_out_indices=[0, 1, 3, 4], **NECK)
    ),
    "dpt_backbone": lambda: dpt_with_depth(hf.DPTConfig(backbone_config=depth_backbone(), **NECK)),
}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture
def write_tiny(tmp_path: Path) -> Callable[..., Path]:
    """A function: model type -> the folder of a tiny random model, with no weight at its initial value."""

    def write(model_type: str, dtype: torch.dtype = torch.float32) -> Path:
        torch.manual_seed(0)
        model = TINY[model_type]()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        model.to(dtype).save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return write
