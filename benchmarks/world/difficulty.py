"""The difficulty of the small world: top-1 of image classification, for each style and for all styles together.

A linear probe and k-NN are evaluated on frozen features: raw pixels, the architecture of the base with random weights,
and the base. A small ResNet trained for a few steps with the labels gives a lower bound of what can be reached.

    python benchmarks/world/difficulty.py [--base shoulders/world/teachers/base]

Writes difficulty.json and difficulty.md in this folder. Ten minutes on one CPU thread of a busy machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from shoulders.storage.atomic import write_text
from shoulders.tasks.vector_probes import LabelledVectors, knn_top1, linear_top1
from shoulders.world import CLASSES, SIZE, STYLES

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "teachers"))
import base  # noqa: E402  (the training scripts of the teachers are in another folder)
import classifier  # noqa: E402
import common  # noqa: E402
import world_data  # noqa: E402
from world_classifier import turn  # noqa: E402

SEED, STEPS, COUNTS = 0, 300, {"train": 4000, "test": 1000}
LabelledImages = tuple[Tensor, Tensor]  # uint8 (B, 3, H, W) and int64 (B,)


def by_style(split: str, work: Path) -> dict[str, LabelledImages]:
    """Images and labels of each style, and of all styles together as ``all``."""
    scenes = world_data.load_styles(split, COUNTS[split], work)
    data = {style: (each.images, each.labels) for style, each in scenes.items()}
    data["all"] = (torch.cat([x for x, _ in data.values()]), torch.cat([y for _, y in data.values()]))
    return data


def pixels(images: Tensor) -> Tensor:
    """The pixels of the images at 16 x 16 px (B, 768)."""
    return F.interpolate(images.float(), size=(16, 16), mode="area").flatten(1) / 255


def summary(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from images to the CLS token of the model (B, C)."""

    @torch.no_grad()
    def compute(images: Tensor) -> Tensor:
        return base.summaries(model.eval(), images, SIZE)

    return compute


def probe(
    features: Callable[[Tensor], Tensor], train: dict[str, LabelledImages], test: dict[str, LabelledImages]
) -> Any:
    """Top-1 in % of both probes, by style."""
    fitted = {style: features(train[style][0]) for style in STYLES}
    held_out = {style: features(test[style][0]) for style in STYLES}
    fitted["all"], held_out["all"] = torch.cat(list(fitted.values())), torch.cat(list(held_out.values()))
    scores: dict[str, dict[str, float]] = {"linear": {}, "k-NN": {}}
    for style in train:
        train_set = LabelledVectors(fitted[style], train[style][1], torch.arange(len(fitted[style])))
        test_set = LabelledVectors(held_out[style], test[style][1], torch.arange(len(held_out[style])))
        for name, measure in (("linear", linear_top1), ("k-NN", knn_top1)):
            scores[name][style] = round(100 * measure(train_set, None, test_set, len(CLASSES), SEED)[0], 1)
    return scores


def supervised(train: LabelledImages, test: LabelledImages) -> float:
    """Top-1 in % of a small ResNet trained with these labels; no setting was selected by a score."""
    torch.manual_seed(SEED)
    model = classifier.build_model(CLASSES, (24, 48, 96), (1, 1, 1)).to(memory_format=torch.channels_last).train()
    matrices = [weight for weight in model.resnet.parameters() if weight.ndim == 4]
    rest = [weight for weight in model.parameters() if weight.ndim != 4]
    optimizers = common.Optimizers(matrices, rest, lr=0.03, rest_lr=3e-3, decay=0.05)
    for step, batch in common.epoch_batches(len(train[1]), 128, SEED, 0, STEPS):
        images = turn(train[0][batch], torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=images.contiguous(memory_format=torch.channels_last)).logits
        F.cross_entropy(logits.float(), train[1][batch], label_smoothing=0.1).backward()
        optimizers.step(common.one_cycle(step, STEPS))
    return round(classifier.top1(model, *test, SIZE), 1)


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table: one row for each method, one column for each style."""
    columns = [*STYLES, "all"]
    lines = ["| top-1, % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=HERE.parents[1] / "shoulders/world/teachers/base")
    parser.add_argument("--work", type=Path, default=Path("runs/world/difficulty"), help="folder of the drawn scenes")
    args = parser.parse_args()
    started_at = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train, test = by_style("train", args.work), by_style("test", args.work)
    rows: dict[str, dict[str, float]] = {}
    untrained = AutoModel.from_config(AutoConfig.from_pretrained(args.base))
    trained = AutoModel.from_pretrained(args.base, dtype=torch.float32)
    for name, features in (("pixels", pixels), ("random ViT", summary(untrained)), ("base", summary(trained))):
        for head, row in probe(features, train, test).items():
            rows[f"{name}, {head}"] = row
        print(as_table(rows), flush=True)
    rows[f"small ResNet, {STEPS} steps with labels"] = {style: supervised(train[style], test[style]) for style in train}
    result = {
        "counts": COUNTS,
        "seed": SEED,
        "steps": STEPS,
        "seconds": round(time.perf_counter() - started_at),
        "top1": rows,
    }
    write_text(HERE / "difficulty.json", json.dumps(result, indent=1) + "\n")
    write_text(HERE / "difficulty.md", as_table(rows))
    print(as_table(rows), flush=True)


if __name__ == "__main__":
    main()
