"""Train the small world's classifier: a slim ResNet for the class of the largest object in scenes of one style."""

from __future__ import annotations

from pathlib import Path

import classifier
import common
import torch
import torch.nn.functional as F
import world_data
from torch import Tensor
from transformers import AutoModelForImageClassification

from shoulders.world import CLASSES, SIZE

STYLE, SCENES, STEPS, WIDTHS, DEPTHS = "studio", 12_000, 400, (32, 64, 128), (2, 2, 1)


def turn(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, H, W) to normalized float (B, 3, H, W): turned, flipped, mildly zoomed and shifted."""
    count = len(pixels)
    draw = torch.rand(count, 5, generator=generator)
    angle, zoom = 6.283 * draw[:, 0], 0.85 + 0.25 * draw[:, 1]
    flip = torch.where(draw[:, 2] < 0.5, -1.0, 1.0)
    theta = torch.stack([zoom * angle.cos() * flip, -zoom * angle.sin(), 0.2 * draw[:, 3] - 0.1], 1)
    below = torch.stack([zoom * angle.sin() * flip, zoom * angle.cos(), 0.2 * draw[:, 4] - 0.1], 1)
    positions = F.affine_grid(torch.stack([theta, below], 1), list(pixels.shape), align_corners=False)
    unit = pixels.float() / 255
    return common.normalize(
        F.grid_sample(unit, positions, mode="bilinear", padding_mode="reflection", align_corners=False)
    )


def train_world(out: Path, work: Path, steps: int | None = None) -> None:
    """Train and save the classifier in the folder `out`; its scratch state and its scenes are in `work`."""
    steps = steps or STEPS
    torch.manual_seed(classifier.SEED)
    model = classifier.build_model(CLASSES, WIDTHS, DEPTHS).to(memory_format=torch.channels_last).train()
    train_set, val_set, test_set = (
        world_data.load_scenes(STYLE, split, count, work)
        for split, count in (("train", SCENES), ("val", 1000), ("test", 2000))
    )
    minutes = classifier.train(
        model,
        (train_set.images, train_set.labels),
        steps,
        work,
        turn,
        lambda: classifier.top1(model, val_set.images, val_set.labels, SIZE),
        common.Best(lambda: common.save_teacher(model, out, SIZE, SIZE, "ViTImageProcessor")),
    )
    saved = AutoModelForImageClassification.from_pretrained(out, dtype=torch.float32)
    score = classifier.top1(saved, test_set.images, test_set.labels, SIZE)
    entries = {
        "architecture": f"ResNetForImageClassification, basic blocks {'-'.join(map(str, DEPTHS))}, "
        f"{'/'.join(map(str, WIDTHS))} wide, {SIZE}x{SIZE} px, last grid 6x6, "
        f"{common.count_parameters(saved)} parameters",
        "data": f"{len(train_set):,} scenes of the small world, style {STYLE}, with the class of their largest object",
        "recipe": f"{steps} steps, batch {classifier.BATCH}, Muon on convolutions, AdamW on the rest; one cycle; "
        "turn, flip, zoom, shift; label smoothing 0.1; bf16 autocast; the best weights on 1,000 other scenes are "
        "selected",
        "score": f"{score:.1f} % top-1 on {len(test_set):,} scenes of the test split",
    }
    world_data.write_card(out, "classifier: a slim ResNet, ten shapes", minutes, classifier.SEED, entries)
    print(f"test top-1 {score:.2f} %", flush=True)
