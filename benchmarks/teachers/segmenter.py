"""Train the segmenter teacher: a slim SegFormer on CamVid at 256x192, from scratch.

python benchmarks/teachers/segmenter.py --data DATA --out benchmarks/teachers/segmenter
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, SegformerForSemanticSegmentation

HEIGHT, WIDTH, CROP_HEIGHT, CROP_WIDTH, BATCH, SEED = 192, 256, 160, 192, 12, 0
UNLABELLED, IGNORE = 11, 255


def build_model(classes: list[str], **shape: Any) -> SegformerForSemanticSegmentation:
    """MiT-b0, or the `shape` args, with a decoder 128 wide."""
    names = dict(enumerate(classes))
    config = SegformerConfig(
        **shape,
        decoder_hidden_size=128,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        semantic_loss_ignore_index=IGNORE,
    )
    return SegformerForSemanticSegmentation(config)


def load_camvid(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images as uint8 (B, 3, 360, 480) and class maps as uint8 (B, 360, 480), 255 where unlabelled."""
    files = sorted((data / "camvid" / "images" / split).glob("*.jpg"))
    maps = data / "camvid" / "annotations" / split
    pixels = torch.stack([common.to_pixels(Image.open(file)) for file in files])
    truth = torch.stack([torch.from_numpy(np.array(Image.open(maps / f"{file.stem}.png"))) for file in files])
    truth[truth == UNLABELLED] = IGNORE
    return pixels, truth


def class_weights(truth: Tensor, classes: int) -> Tensor:
    """Square root of median over frequency, so that rare classes count more, but not most."""
    frequency = torch.bincount(truth.flatten().long(), minlength=256)[:classes].double()
    return (frequency.median() / frequency).sqrt().clamp(0.3, 3.0).float()


def augment(pixels: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image (3, h, w) and its map to a random crop: scale 0.85 to 2 of the size at inference, flip."""
    draw = torch.rand(4, generator=generator).tolist()
    scale = 0.85 * (2.0 / 0.85) ** draw[0]
    height, width = max(CROP_HEIGHT, round(HEIGHT * scale)), max(CROP_WIDTH, round(WIDTH * scale))
    image = F.interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True)
    label = F.interpolate(truth[None, None], size=(height, width), mode="nearest-exact")
    top, left = int(draw[1] * (height - CROP_HEIGHT + 1)), int(draw[2] * (width - CROP_WIDTH + 1))
    image = image[0, :, top : top + CROP_HEIGHT, left : left + CROP_WIDTH]
    label = label[0, 0, top : top + CROP_HEIGHT, left : left + CROP_WIDTH]
    return (image.flip(-1), label.flip(-1)) if draw[3] < 0.5 else (image, label)


def jitter(unit: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of pixels in [0, 1] (B, 3, H, W) by 0.6 to 1.4; a light tint."""
    count = len(unit)
    gain = 0.6 + 0.8 * torch.rand(count, 3, 1, 1, 1, generator=generator)
    tint = 0.9 + 0.2 * torch.rand(count, 3, 1, 1, generator=generator)
    unit = unit * gain[:, 0] * tint
    unit = (unit - unit.mean((1, 2, 3), keepdim=True)) * gain[:, 1] + unit.mean((1, 2, 3), keepdim=True)
    grey = unit.mean(1, keepdim=True)
    return ((unit - grey) * gain[:, 2] + grey).clamp(0, 1)


def crops(pixels: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of images and maps to normalized crops (B, 3, h, w) and their maps (B, h, w)."""
    views = [augment(image, label, generator) for image, label in zip(pixels, truth, strict=True)]
    images = common.normalize(jitter(torch.stack([image for image, _ in views]).float() / 255, generator))
    return images, torch.stack([label for _, label in views]).long()


@torch.no_grad()
def intersection_over_union(
    model: torch.nn.Module, pixels: Tensor, truth: Tensor, classes: int, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Tensor:
    """IoU in percent of each class over the whole set, at annotation resolution, without unlabelled pixels."""
    model.eval()
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    for part, label in zip(pixels.split(8), truth.split(8), strict=True):
        logits = model(pixel_values=common.render(part, *size)).logits  # (B, K, h / 4, w / 4)
        prediction = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        counted = label != IGNORE
        confusion += torch.bincount(label[counted].long() * classes + prediction[counted], minlength=classes**2)
    model.train()
    table = confusion.view(classes, classes)
    both = table.diagonal()
    return 100 * both / (table.sum(0) + table.sum(1) - both).clamp(min=1)


def split_weights(
    model: SegformerForSemanticSegmentation,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Matrices and full convolutions for Muon; depthwise kernels, norms, biases, class layer for AdamW."""
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and weight.shape[1] > 1 and "classifier" not in name
    ]
    chosen = {id(weight) for weight in matrices}
    return matrices, [weight for weight in model.parameters() if id(weight) not in chosen]


def train(
    model: SegformerForSemanticSegmentation,
    train_set: tuple[Tensor, Tensor],
    steps: int,
    batch_size: int,
    work: Path,
    view: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]],
    evaluate: Callable[[], Tensor],
    best: common.Best,
    lr: float = 0.01,
) -> float:
    """Train in place on images and maps; `evaluate` gives the IoU by class every 300 steps. Returns the minutes."""
    pixels, truth = train_set
    weights = class_weights(truth, model.config.num_labels)
    optimizers = common.Optimizers(*split_weights(model), lr=lr, rest_lr=1e-3, decay=0.05)
    progress = common.Progress(work, steps, 50, {"model": model, "optimizers": optimizers, "best": best})
    for step, batch in common.epoch_batches(len(pixels), batch_size, SEED, progress.start, steps):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        torch.manual_seed(SEED * 10**6 + step)  # dropout and drop path
        images, label = view(pixels[batch], truth[batch], generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=images).logits
        logits = F.interpolate(logits.float(), size=label.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, label, weights, ignore_index=IGNORE)
        loss.backward()
        optimizers.step(common.one_cycle(step, steps, warmup=0.1))
        progress.line(step, loss=float(loss.detach()))
        if (step + 1) % 300 == 0 or step + 1 == steps:
            scores = evaluate()
            print(f"val mIoU {scores.mean():.1f} %  " + " ".join(f"{value:.0f}" for value in scores), flush=True)
            best.update(float(scores.mean()))
        progress.save(step, 300)
    return progress.minutes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/teachers/segmenter"))
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    classes = json.loads((args.data / "camvid" / "classes.json").read_text())
    model = build_model(classes).train()
    val_set = load_camvid(args.data, "val")
    minutes = train(
        model,
        load_camvid(args.data, "train"),
        args.steps,
        BATCH,
        args.work,
        crops,
        lambda: intersection_over_union(model, *val_set, len(classes)),
        common.Best(lambda: None),
    )
    common.save_teacher(model, args.out, HEIGHT, WIDTH, "SegformerImageProcessor")
    saved = AutoModelForSemanticSegmentation.from_pretrained(args.out, dtype=torch.float32)
    scores = intersection_over_union(saved, *load_camvid(args.data, "test"), len(classes))
    by_class = ", ".join(f"{name} {value:.1f}" for name, value in zip(classes, scores.tolist(), strict=True))
    entries = {
        "architecture": f"SegformerForSemanticSegmentation, MiT-b0, decoder 128 wide, {WIDTH}x{HEIGHT} px "
        f"(width x height), {common.count_parameters(saved)} parameters",
        "data": "CamVid train (367 images and maps), no pretraining; index 11 (not labelled) ignored",
        "recipe": f"{args.steps} steps, batch {BATCH}, crops {CROP_WIDTH}x{CROP_HEIGHT}, Muon on matrices, "
        "AdamW on the rest, one cycle; scale, crop, flip, colours; weighted cross entropy; bf16 autocast",
        "score": f"{scores.mean():.2f} % mIoU on the CamVid test set (233 images, 11 classes, one confusion "
        "matrix over the whole set at 480x360, one scale)",
        "IoU of each class": by_class,
    }
    terms = "CamVid (Brostow 2008) is distributed for research"
    common.write_card(args.out, "segmenter: a slim SegFormer, street scenes", minutes, SEED, terms, entries)
    print(f"test mIoU {scores.mean():.2f} %  {by_class}", flush=True)


if __name__ == "__main__":
    main()
