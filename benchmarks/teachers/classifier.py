"""Train the classifier teacher: a three-stage ResNet on CIFAR-10 rendered at 64 px, with a last grid of 4x4.

python benchmarks/teachers/classifier.py --data DATA --out benchmarks/teachers/classifier
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

SIZE, BATCH, SEED = 64, 256, 0


def build_model(
    classes: tuple[str, ...] = common.CIFAR_CLASSES,
    widths: tuple[int, ...] = (64, 128, 256),
    depths: tuple[int, ...] = (2, 2, 2),
) -> ResNetForImageClassification:
    """A ResNet of basic blocks."""
    names = dict(enumerate(classes))
    config = ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=list(depths),
        layer_type="basic",
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return ResNetForImageClassification(config)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, 32, 32) to float (B, 3, 64, 64): shift, mild zoom and flip in one transform, then cutout."""
    count = len(pixels)
    draw = torch.rand(count, 6, generator=generator)
    zoom = 0.85 + 0.25 * draw[:, 0]
    flip = torch.where(draw[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * flip, zoom
    theta[:, :, 2] = (draw[:, 2:4] - 0.5) * 0.4  # up to 3.2 of 32 pixels either way
    positions = F.affine_grid(theta, [count, 3, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(
        common.normalize(pixels.float() / 255),
        positions,
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    corner = (draw[:, 4:6] * (SIZE + 16) - 16).long()  # a hole of 20 of 64 px, partly outside at times
    at = torch.arange(SIZE)
    inside = (at >= corner[:, :, None]) & (at < corner[:, :, None] + 20)  # (B, 2, 64)
    return images * ~(inside[:, 0, None, :, None] & inside[:, 1, None, None, :])


@torch.no_grad()
def top1(model: torch.nn.Module, pixels: Tensor, labels: Tensor, side: int = SIZE) -> float:
    """Top-1 in percent, images rendered as at inference, no test-time augmentation."""
    model.eval()
    hits = sum(
        int((model(pixel_values=common.render(part, side, side)).logits.argmax(1) == truth).sum())
        for part, truth in zip(pixels.split(500), labels.split(500), strict=True)
    )
    model.train()
    return 100 * hits / len(labels)


def train(
    model: ResNetForImageClassification,
    train_set: tuple[Tensor, Tensor],
    steps: int,
    work: Path,
    view: Callable[[Tensor, torch.Generator], Tensor],
    evaluate: Callable[[], float],
    best: common.Best,
) -> float:
    """Train in place on pixels and labels, `evaluate` on held-out images every 195 steps; returns the minutes spent."""
    pixels, labels = train_set
    matrices = [weight for weight in model.resnet.parameters() if weight.ndim == 4]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = common.Optimizers(matrices, rest, lr=0.03, rest_lr=3e-3, decay=0.05)
    progress = common.Progress(work, steps, 25, {"model": model, "optimizers": optimizers, "best": best})
    for step, batch in common.epoch_batches(len(labels), BATCH, SEED, progress.start, steps):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        images = view(pixels[batch], generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=images).logits
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
        loss.backward()
        optimizers.step(common.one_cycle(step, steps))
        progress.line(step, loss=float(loss.detach()))
        if (step + 1) % 195 == 0 or step + 1 == steps:
            score = evaluate()
            print(f"held-out top-1 {score:.1f} %", flush=True)
            best.update(score)
        progress.save(step, 195)
    return progress.minutes()


def split(held_out: int) -> tuple[Tensor, Tensor]:
    """Indices of CIFAR-10 train for training, and the last `held_out` of the same shuffle for evaluation."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(SEED))
    return order[: len(order) - held_out], order[len(order) - held_out :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/teachers/classifier"))
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--held", type=int, default=1000, help="training images that are held out to show progress")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = build_model().to(memory_format=torch.channels_last).train()
    pixels, labels = common.load_cifar10(args.data, "train")
    train_index, val_index = split(args.held)
    minutes = train(
        model,
        (pixels[train_index], labels[train_index]),
        int(args.epochs * (len(train_index) // BATCH)),
        args.work,
        augment,
        lambda: top1(model, pixels[val_index], labels[val_index]) if args.held else 0.0,
        common.Best(lambda: None),
    )
    common.save_teacher(model, args.out, SIZE, SIZE, "ViTImageProcessor")
    saved = AutoModelForImageClassification.from_pretrained(args.out, dtype=torch.float32)
    score = top1(saved, *common.load_cifar10(args.data, "test"))
    entries = {
        "architecture": "ResNetForImageClassification, basic blocks 2-2-2, 64/128/256 wide, 64x64 px, "
        f"last grid 4x4, {common.count_parameters(saved)} parameters",
        "data": f"CIFAR-10 train, images and labels (50,000; {args.held:,} of them held out)",
        "recipe": f"{args.epochs:g} epochs, batch {BATCH}, Muon on convolutions, AdamW on the rest; "
        "one cycle; shift, zoom, flip, cutout; label smoothing 0.1; bf16 autocast",
        "score": f"{score:.2f} % top-1 on the CIFAR-10 test set (10,000), no test-time augmentation",
    }
    terms = "CIFAR-10 (Krizhevsky 2009) is distributed for research"
    common.write_card(args.out, "classifier: a small ResNet, ten classes", minutes, SEED, terms, entries)
    print(f"test top-1 {score:.2f} %", flush=True)


if __name__ == "__main__":
    main()
