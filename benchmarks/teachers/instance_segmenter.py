"""Train the instance segmenter teacher: the small world's Mask2Former, fine-tuned on pedestrians (Penn-Fudan).

python benchmarks/teachers/instance_segmenter.py --data DATA --out benchmarks/teachers/instance_segmenter
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import instances
import numpy as np
import segmenter
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForUniversalSegmentation, Mask2FormerForUniversalSegmentation

from shoulders.tasks.average_precision import Matches, average_precision, interval, match
from shoulders.tasks.data.coco import Annotations, decode, read_annotations

SIDE, BATCH, MAX_OBJECTS = 192, 8, 12
HELD_OUT_EVERY = 6  # each sixth training photo is held out, to select the step
WORLD = Path(__file__).parents[2] / "shoulders" / "world" / "teachers" / "instances"


@dataclass(frozen=True)
class Photos:
    """Photos (3, H, W) uint8, maps (H, W) uint8 of their objects (0 background, i + 1 object i), annotations."""

    pixels: list[Tensor]
    owners: list[Tensor]
    truth: Annotations

    def at(self, numbers: Sequence[int]) -> Photos:
        pictures = tuple(self.truth.images[number] for number in numbers)
        return Photos(
            [self.pixels[number] for number in numbers],
            [self.owners[number] for number in numbers],
            Annotations(self.truth.classes, pictures),
        )


def load_pennfudan(data: Path, split: str) -> Photos:
    """All photos of a split."""
    folder = data / "pennfudan"
    truth = read_annotations(folder / f"{split}.json")
    pixels, owners = [], []
    for picture in truth.images:
        pixels.append(common.to_pixels(Image.open(folder / split / picture.file)))
        owner = np.zeros(picture.size, dtype=np.uint8)
        for number, mask in enumerate(decode(picture.masks or (), picture.size), start=1):
            owner[mask] = number
        owners.append(torch.from_numpy(owner))
    return Photos(pixels, owners, truth)


def view(pixels: Tensor, owner: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random part of a photo and its map at the size of the model: crop, stretch, flip."""
    draw = torch.rand(5, generator=generator).tolist()
    height, width = owner.shape
    side = 1 - 0.6 * draw[0] ** 1.5
    tall, wide = (min(1.0, side * 1.3 ** (sign * (2 * draw[1] - 1))) for sign in (1, -1))
    tall, wide = int(tall * height), int(wide * width)
    top, left = int(draw[2] * (height - tall + 1)), int(draw[3] * (width - wide + 1))
    part, part_owner = pixels[:, top : top + tall, left : left + wide], owner[top : top + tall, left : left + wide]
    part = F.interpolate(part[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    part_owner = F.interpolate(part_owner[None, None], size=(SIDE, SIDE), mode="nearest-exact")[0, 0]
    return (part.flip(-1), part_owner.flip(-1)) if draw[4] < 0.5 else (part, part_owner)


def paste(images: Tensor, owners: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paste some objects of each view over the next one of the batch (Ghiasi et al., Copy-Paste, 2021)."""
    from_images, from_owners = images.roll(1, 0), owners.roll(1, 0)
    chance = torch.rand(len(images), 1, generator=generator).sub(0.3).clamp(min=0)  # that an object is pasted
    is_pasted = torch.rand(len(images), 256, generator=generator) < chance
    is_pasted[:, 0] = False
    over = is_pasted.gather(1, from_owners.flatten(1).long()).view_as(owners)
    return torch.where(over[:, None], from_images, images), torch.where(over, from_owners + 100, owners)


def number_objects(owner: Tensor, smallest: int = 60) -> Tensor:
    """The map with its objects numbered from 1, the largest first; those that are too small become background."""
    sizes = torch.bincount(owner.flatten().long(), minlength=256)
    sizes[0] = 0
    kept = [number for number in sizes.argsort(descending=True).tolist()[:MAX_OBJECTS] if sizes[number] >= smallest]
    names = torch.zeros(256, dtype=torch.uint8)
    names[kept] = torch.arange(1, len(kept) + 1, dtype=torch.uint8)
    return names[owner.long()]


def start_from(world: Path, classes: Sequence[str]) -> Mask2FormerForUniversalSegmentation:
    """The world's instance segmenter with a new class layer."""
    names = dict(enumerate(classes))
    return Mask2FormerForUniversalSegmentation.from_pretrained(
        world,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def score(model: Mask2FormerForUniversalSegmentation, photos: Photos) -> tuple[Matches, Matches]:
    """The model's detections matched with the annotations: boxes and masks."""
    detections = instances.detect(model, photos.pixels, (SIDE, SIDE), part=10)
    return match(photos.truth, detections, "boxes"), match(photos.truth, detections, "masks")


def train(model: Mask2FormerForUniversalSegmentation, photos: Photos, steps: int, work: Path, out: Path) -> float:
    """Train in place on five sixths of the photos, select the step on the rest; returns the minutes spent."""
    numbers = range(len(photos.pixels))
    train_set = photos.at([number for number in numbers if number % HELD_OUT_EVERY])
    held_out = photos.at([number for number in numbers if number % HELD_OUT_EVERY == 0])

    def make(index: Tensor, generator: torch.Generator) -> instances.Batch:
        views = [view(train_set.pixels[number], train_set.owners[number], generator) for number in index.tolist()]
        images = segmenter.jitter(torch.stack([image for image, _ in views]).float() / 255, generator)
        images, owners = paste(images, torch.stack([owner for _, owner in views]), generator)
        owners = torch.stack([number_objects(owner) for owner in owners])
        present = torch.arange(1, MAX_OBJECTS + 1) <= owners.flatten(1).amax(1)[:, None]  # (B, n)
        labels = torch.where(present, 0, -1)
        return common.normalize(images), labels, instances.to_covered(owners, MAX_OBJECTS)

    return instances.train(
        model,
        len(train_set.pixels),
        BATCH,
        steps,
        work,
        make,
        lambda: average_precision(score(model, held_out)[1])["AP"],
        common.Best(lambda: common.save_teacher(model, out, SIDE, SIDE, "Mask2FormerImageProcessor")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/teachers/instance_segmenter"))
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(instances.SEED)
    photos = load_pennfudan(args.data, "train")
    model = start_from(WORLD, photos.truth.classes).train()
    minutes = train(model, photos, args.steps, args.work, args.out)
    saved = AutoModelForUniversalSegmentation.from_pretrained(args.out, dtype=torch.float32)
    test_set = load_pennfudan(args.data, "val")
    summaries = []
    for kind, result in zip(("box", "mask"), score(saved, test_set), strict=True):
        scores, (low, high) = average_precision(result), interval(result, draws=1000)
        summaries.append(f"{kind} AP {scores['AP']:.3f} ({low:.3f} to {high:.3f}), AP50 {scores['AP50']:.3f}")
    entries = {
        "architecture": f"{instances.describe(saved)}, {SIDE}x{SIDE} px",
        "data": f"Penn-Fudan train: {len(photos.pixels)} photos with masks, each sixth held out to choose the step; "
        "started from the instance segmenter of the small world (drawn scenes)",
        "recipe": f"{args.steps} steps, batch {BATCH}, Muon on matrices and convolutions, AdamW on the rest, one "
        "cycle; crop, stretch, flip, colours, copy and paste; set loss over whole masks; bf16 autocast",
        "score": "; ".join(summaries)
        + f" on Penn-Fudan val ({len(test_set.pixels)} photos, COCO AP over IoU .50 to .95; "
        "95 % of 1,000 resamplings; boxes are those of the masks)",
    }
    terms = "Penn-Fudan (Wang 2007) is distributed for research"
    title = "instance_segmenter: a small Mask2Former, pedestrians"
    common.write_card(args.out, title, minutes, instances.SEED, terms, entries)
    print("val " + "; ".join(summaries), flush=True)


if __name__ == "__main__":
    main()
