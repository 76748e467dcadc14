"""What several tests build on: tiny random models, images, the recipe over them, and the command line."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from shoulders.cli import main
from shoulders.config.recipe import Recipe, check_recipe
from shoulders.features import Features

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


def save_tiny_world(root: Path, images: int = 60) -> Path:
    """The folders that `tiny_recipe` names: a base, two teachers and ``images`` images."""
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    save_images(root / "images", images)
    return root


def tiny_tree(root: Path, out: Path | str = "run", **changes: Any) -> dict[str, Any]:
    """The recipe over `save_tiny_world` as plain data.

    Args:
        root: the folder of the base, the teachers and the images.
        out: the run folder; relative to ``root``.
        changes: ``train__steps=3`` sets one key, ``train={..}`` replaces a whole section; a section that is None is
            left out.
    """
    tree: dict[str, Any] = {
        "student": {"base": str(root / "base"), "adapter": {"kind": "bottleneck", "width": 8}},
        "teachers": {
            "classifier": {"model": str(root / "classifier")},
            "segmenter": {"model": str(root / "segmenter"), "taps": ["stage0", "stage1"]},
        },
        "images": {"path": str(root / "images"), "size": 32, "holdout": 12, "workers": 0},
        "transfer": {"calibration_images": 16},
        "train": {"steps": 4, "batch": 8, "lr": 5e-3, "precision": "fp32", "log_every": 1},
        "out": str(root / out),
    }
    for key, value in changes.items():
        _set(tree, key.split("__"), value)
    return tree


def tiny_recipe(root: Path, out: Path | str = "run", **changes: Any) -> Recipe:
    """`tiny_tree`, checked."""
    return check_recipe(tiny_tree(root, out, **changes))


def _set(tree: dict[str, Any], key: list[str], value: Any) -> None:
    *sections, last = key
    for section in sections:
        tree = tree.setdefault(section, {})
    if value is None:
        tree.pop(last, None)
    else:
        tree[last] = deepcopy(value)


def student_weights(run: Path) -> dict[str, Tensor]:
    """The weights of the student in a run folder."""
    return load_file(run / "student" / "model.safetensors")


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metric_rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind in the metrics.jsonl of a run folder."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and its output."""

    returncode: int
    stdout: str
    stderr: str


def run_cli(*args: object) -> Finished:
    """Run ``shoulders ARGS`` in this process."""
    out, err, format_warning = io.StringIO(), io.StringIO(), warnings.formatwarning
    code: Any = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main([str(arg) for arg in args])
    except SystemExit as end:
        code = end.code
    finally:
        warnings.formatwarning = format_warning
    return Finished(int(code or 0), out.getvalue(), err.getvalue())


class Colours(torch.nn.Module):
    """Mean colours of an image, and of its 8 x 8 px patches."""

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        return {"mean.rgb": Features.from_map(torch.nn.functional.avg_pool2d(pixels, 8), pixels.mean((2, 3)))}
