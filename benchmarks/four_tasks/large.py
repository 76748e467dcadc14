"""A run with teachers of the size of common hub models, with random weights, to measure the cost of inference.

The student is a ViT-S/16 with an adapter beside it, trained for two steps on noise: training does not change the cost.
All models take 256 px; detectors and instance segmenters of the hub mostly take twice that and more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill
from shoulders.storage.atomic import write_text

SIZE, IMAGES = 256, 40
VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16, "image_size": SIZE}
B2 = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
BASE = "base"
MODELS: dict[str, tuple[Callable[[], Any], str]] = {  # name -> model, image processor
    BASE: (lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT_S)), "ViTImageProcessor"),
    # ResNet-50
    "classifier": (lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)), "ViTImageProcessor"),
    # R50
    "detector": (lambda: hf.RTDetrV2ForObjectDetection(hf.RTDetrV2Config(num_labels=80)), "RTDetrImageProcessor"),
    # MiT-B2
    "segmenter": (
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**B2, num_labels=150)),
        "SegformerImageProcessor",
    ),
    # Swin-T
    "instances": (
        lambda: hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(num_labels=80)),
        "Mask2FormerImageProcessor",
    ),
}


def large_run(work: Path) -> Path:
    """The run folder; what does not exist yet is created."""
    folder = work / "large"
    for name, (make, processor) in MODELS.items():
        if not (folder / name / "preprocessor_config.json").exists():
            torch.manual_seed(0)
            make().save_pretrained(folder / name)
            write_text(folder / name / "preprocessor_config.json", json.dumps({"image_processor_type": processor}))
    (folder / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    run = folder / "seed-0"
    teachers = [name for name in MODELS if name != BASE]
    recipe = check_recipe(
        {
            "student": {"base": str(folder / BASE), "adapter": {"kind": "conv", "width": 128}},
            "teachers": {name: {"model": str(folder / name), "size": SIZE} for name in teachers},
            "images": {"path": str(folder / "images"), "size": SIZE, "holdout": 8, "workers": 0},
            "transfer": {"calibration_images": 16, "layers": ["block3", "block7", "latent"]},
            "train": {"steps": 2, "batch": 4, "save_every": 2},
            "keep_heads": teachers,
            "out": str(run),
        }
    )
    distill(recipe, resume=True)
    return run
