"""Train the detector teacher: the small world's RT-DETR v2, fine-tuned on blood cells (BCCD) at 256x192.

python benchmarks/teachers/detector.py --data DATA --out benchmarks/teachers/detector
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import detection
import torch
import torch.nn.functional as F
from PIL import Image
from segmenter import jitter
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, RTDetrV2ForObjectDetection

from shoulders.tasks.average_precision import average_precision, interval, match
from shoulders.tasks.data.coco import Annotations, read_annotations

HEIGHT, WIDTH, BATCH, SEED = 192, 256, 8, 0
QUERIES, NOISE = 80, 28  # an image has up to 30 cells
ANCHORS = 3  # of the encoder for each cell; there are many cells
CLASS_LAYERS = ("class_embed", "enc_score_head")


def load_bccd(data: Path, split: str) -> tuple[detection.Labelled, Annotations]:
    """A split of BCCD in memory, as a batch and as annotations."""
    truth = read_annotations(data / "bccd" / f"{split}.json")
    files = [data / "bccd" / split / picture.file for picture in truth.images]
    pixels = torch.stack([common.to_pixels(Image.open(file)) for file in files])  # (B, 3, 480, 640)
    side = torch.tensor([pixels.shape[3], pixels.shape[2]]).repeat(2)
    classes = [torch.from_numpy(picture.classes) for picture in truth.images]
    boxes = [torch.from_numpy(picture.boxes).float() / side for picture in truth.images]
    padded = [nn.utils.rnn.pad_sequence(part, True, value) for part, value in ((classes, -1), (boxes, 0.0))]
    return detection.Labelled(pixels, *padded), truth


def start_model(classes: list[str], start: Path) -> RTDetrV2ForObjectDetection:
    """The world's detector with heads for other classes, and more queries."""
    model = detection.build_model(classes, num_queries=QUERIES, num_denoising=NOISE)
    world = AutoModelForObjectDetection.from_pretrained(start, dtype=torch.float32).state_dict()
    model.load_state_dict(
        {
            name: value if any(part in name for part in CLASS_LAYERS) else world[name]
            for name, value in model.state_dict().items()
        }
    )
    return model


def crop(pixels: Tensor, classes: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A part of an image (3, h, w), 0.55 to 1 of each side, flipped or not, at the size of inference; its cells.

    A cell is kept if 0.4 of its box or more is inside.
    """
    draw = torch.rand(6, generator=generator).tolist()
    side = 0.55 + 0.45 * draw[0]
    across, down = min(1.0, side * (0.85 + 0.3 * draw[1])), side
    left, top = draw[2] * (1 - across), draw[3] * (1 - down)
    height, width = pixels.shape[1:]
    part = pixels[
        :, round(top * height) : round((top + down) * height), round(left * width) : round((left + across) * width)
    ]
    image = F.interpolate(part[None], size=(HEIGHT, WIDTH), mode="bicubic", antialias=True)[0]
    moved = (boxes - torch.tensor([left, top, left, top])) / torch.tensor([across, down, across, down])
    inside = moved.clamp(0, 1)
    areas = [(each[:, 2:] - each[:, :2]).prod(-1) for each in (inside, moved)]
    classes = torch.where(areas[0] >= 0.4 * areas[1], classes, -1)
    if draw[4] < 0.5:
        image, inside = image.flip(2), detection.mirrored(inside, 0)
    if draw[5] < 0.5:
        image, inside = image.flip(1), detection.mirrored(inside, 1)
    return image, classes, inside


def crops(train_set: detection.Labelled, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized crops of a batch, their classes and their boxes, padding last."""
    views = [crop(train_set.pixels[i], train_set.classes[i], train_set.boxes[i], generator) for i in batch.tolist()]
    images, classes, boxes = (torch.stack(part) for part in zip(*views, strict=True))
    order = (classes < 0).int().argsort(dim=1, stable=True)
    classes, boxes = classes.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return common.normalize(jitter(images.float() / 255, generator)), classes, boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, default=Path("shoulders/world/teachers/detector"))
    parser.add_argument("--work", type=Path, default=Path("runs/teachers/detector"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.005)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    (train_set, truth), (val_set, val_truth), (test_set, test_truth) = (
        load_bccd(args.data, split) for split in ("train", "val", "test")
    )
    model = start_model(list(truth.classes), args.start).train()

    def evaluate() -> float:
        return average_precision(match(val_truth, detection.detect(model, val_set.pixels, HEIGHT, WIDTH)))["AP"]

    best = common.Best(lambda: common.save_teacher(model, args.out, HEIGHT, WIDTH, detection.PROCESSOR))
    minutes = detection.train(model, train_set, args.steps, BATCH, args.lr, ANCHORS, args.work, crops, evaluate, best)
    saved = AutoModelForObjectDetection.from_pretrained(args.out, dtype=torch.float32)
    matched = match(test_truth, detection.detect(saved, test_set.pixels, HEIGHT, WIDTH))
    scores, (low, high) = average_precision(matched), interval(matched)
    entries = {
        "architecture": f"RTDetrV2ForObjectDetection, ResNet of 3 stages, maps at strides 8 and 16, 96 wide, 3 decoder "
        f"layers, {QUERIES} queries, {WIDTH}x{HEIGHT} px (width x height), {common.count_parameters(saved)} parameters",
        "data": f"BCCD train ({len(train_set.pixels)} images, 3 classes); started from the detector of the small world",
        "recipe": f"{args.steps} steps, batch {BATCH}, crops, flips, colours, Muon on matrices, AdamW on the rest, "
        "one cycle; maps in bf16, queries and boxes in fp32; the best weights on BCCD val "
        f"({len(val_set.pixels)} images) are selected",
        "score": f"{scores['AP']:.3f} box AP (.50:.95) on BCCD test ({len(test_set.pixels)} images), 95 % interval "
        f"over images {low:.3f} to {high:.3f}; AP50 {scores['AP50']:.3f}, AP75 {scores['AP75']:.3f}",
    }
    terms = "BCCD (Shenggan/BCCD_Dataset) is MIT"
    common.write_card(args.out, "detector: a small RT-DETR v2, blood cells", minutes, SEED, terms, entries)
    print(f"test AP {scores['AP']:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
