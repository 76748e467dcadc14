"""Train the small world's segmenter: a slim SegFormer for the classes of all pixels in scenes of one style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import segmenter
import torch
import world_data
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation

from shoulders.world import CLASSES, SIZE

STYLE, SCENES, STEPS, BATCH = "paper", 12_000, 4500, 24
NAMES = ["background", *CLASSES]
SHAPE: dict[str, Any] = {
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [2, 2, 2, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "mlp_ratios": [4, 4, 4, 4],
    "drop_path_rate": 0.0,
}


def turn(pixels: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch and its maps to normalized images (B, 3, H, W) and maps (B, H, W): turned, flipped, recoloured."""
    quarter, flip = torch.randint(8, (2,), generator=generator).tolist()
    images = segmenter.jitter(pixels.float() / 255, generator)
    images, label = images.rot90(quarter % 4, (2, 3)), truth.long().rot90(quarter % 4, (1, 2))
    images, label = (images.flip(3), label.flip(2)) if flip < 4 else (images, label)
    return common.normalize(images), label


def train_world(out: Path, work: Path, steps: int | None = None) -> None:
    """Train and save the segmenter in the folder `out`; its scratch state and its scenes are in `work`."""
    steps = steps or STEPS
    torch.manual_seed(segmenter.SEED)
    model = segmenter.build_model(NAMES, **SHAPE).train()
    train_set, val_set, test_set = (
        world_data.load_scenes(STYLE, split, count, work)
        for split, count in (("train", SCENES), ("val", 400), ("test", 2000))
    )

    def score(model: torch.nn.Module, scenes: world_data.Scenes) -> Tensor:
        return segmenter.intersection_over_union(model, scenes.images, scenes.semantic, len(NAMES), (SIZE, SIZE))

    minutes = segmenter.train(
        model,
        (train_set.images, train_set.semantic),
        steps,
        BATCH,
        work,
        turn,
        lambda: score(model, val_set),
        common.Best(lambda: common.save_teacher(model, out, SIZE, SIZE, "SegformerImageProcessor")),
        lr=0.02,
    )
    saved = AutoModelForSemanticSegmentation.from_pretrained(out, dtype=torch.float32)
    each = score(saved, test_set)
    by_class = ", ".join(f"{name} {value:.1f}" for name, value in zip(NAMES, each.tolist(), strict=True))
    entries = {
        "architecture": f"SegformerForSemanticSegmentation, {'/'.join(map(str, SHAPE['hidden_sizes']))} wide, "
        f"decoder 128 wide, {SIZE}x{SIZE} px, {common.count_parameters(saved)} parameters",
        "data": f"{len(train_set):,} scenes of the small world, style {STYLE}, with their class maps",
        "recipe": f"{steps} steps, batch {BATCH}, Muon on matrices, AdamW on the rest, one cycle; quarter turns, flip, "
        "colours; weighted cross entropy; bf16 autocast; the best weights on 400 other scenes are selected",
        "score": f"{each.mean():.1f} % mIoU on {len(test_set):,} scenes of the test split ({len(NAMES)} classes, one "
        "confusion matrix over all)",
        "IoU of each class": by_class,
    }
    world_data.write_card(out, "segmenter: a slim SegFormer, ten shapes", minutes, segmenter.SEED, entries)
    print(f"test mIoU {each.mean():.2f} %  {by_class}", flush=True)
