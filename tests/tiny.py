"""Tiny random models and images that several tests build on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_WIDE = _VIT | {"intermediate_size": 64}
# model_type -> a config of a few thousand parameters
BASE_CONFIGS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: transformers.Dinov2Config(**_VIT),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**_VIT),
    "dinov3_vit": lambda: transformers.DINOv3ViTConfig(**_WIDE),
    "siglip_vision_model": lambda: transformers.SiglipVisionConfig(**_WIDE),
    "vit": lambda: transformers.ViTConfig(**_WIDE),
}
ADAPTERS: list[dict[str, Any]] = [
    {"kind": "bottleneck", "width": 8},
    {"kind": "lora", "rank": 4, "alpha": 8.0},
    {"kind": "side", "width": 16, "blocks": 2},
    {"kind": "conv", "width": 32, "depth": 1, "blocks": []},
]


def _takes_32_px(folder: Path) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    return folder


def save_base(folder: Path, kind: str = "dinov2") -> Path:
    """A random base in transformers format."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(BASE_CONFIGS[kind]()).save_pretrained(folder)
    return folder


def save_convnext(folder: Path, seed: int = 1) -> Path:
    """A random hierarchical teacher with a summary, in transformers format; 32 px, two stages, grid 8 x 8."""
    torch.manual_seed(seed)
    config = transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2, image_size=32, patch_size=2)
    transformers.ConvNextModel(config).save_pretrained(folder)
    return _takes_32_px(folder)


def save_segformer(folder: Path) -> Path:
    """A random teacher without a summary, in transformers format; its weights in fp16, as shipped ones are."""
    torch.manual_seed(2)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        image_size=32,
    )
    transformers.SegformerModel(config).half().save_pretrained(folder)
    return _takes_32_px(folder)


def save_images(folder: Path, count: int, classes: int = 0) -> Path:
    """Random small JPEG images; in class folders where ``classes`` is given, each class with its own colour."""
    rng = np.random.default_rng(0)
    for i in range(count):
        inside = folder / f"class{i % classes}" if classes else folder
        inside.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (40, 48, 3), dtype=np.uint8)
        if classes:
            pixels[..., i % classes % 3] += 90
        Image.fromarray(pixels).resize((96, 80)).save(inside / f"{i:04d}.jpg")
    return folder
