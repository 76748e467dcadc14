"""What an added teacher costs: seconds per step with 1 to 5 teachers, against the parts that it is made of.

    python benchmarks/teacher_cost/run.py [--rounds 7]

Each row adds one teacher to the recipe and changes nothing else. ``predicted`` is the step with one teacher less, plus
the new teacher's own forward, plus its projectors (standardize, project, compare, t2s, backward and AdamW), each timed
alone. Medians of interleaved rounds on one machine: only ratios mean anything. Writes results.json and table.md here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from shoulders.config.recipe import check_recipe
from shoulders.distillation import Trainer, prepare
from shoulders.distributed.context import DistContext
from shoulders.features import Batch, Features
from shoulders.storage.atomic import write_text

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "teachers"
BATCH, SIZE = 32, 64
# three more teachers of other families, with random weights: only their cost matters here
RANDOM: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=64,
            patch_size=8,
        )
    ),
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(
            depths=[2, 2, 4], hidden_sizes=[48, 96, 192], num_stages=3, image_size=64, patch_size=4
        )
    ),
    "regnet": lambda: transformers.RegNetModel(
        transformers.RegNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256], depths=[1, 2, 2], groups_width=16)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        specs = teachers(Path(scratch))
        names = list(specs)
        steps: dict[str, Callable[[], object]] = {}
        parts: dict[str, Callable[[], object]] = {}
        for n in range(1, len(names) + 1):
            some = build(Path(scratch), {name: specs[name] for name in names[:n]})
            alone = build(Path(scratch), {names[n - 1]: specs[names[n - 1]]}, preserve=0.0)
            batch = images(some)
            steps[str(n)] = partial(some.step, 1, batch)
            parts[f"{n} forward"] = partial(alone.teachers, batch)
            parts[f"{n} projectors"] = projectors(alone, batch)
        seconds = interleaved(steps | parts, rounds)
    rows: list[dict[str, Any]] = []
    for n, name in enumerate(names, 1):
        row: dict[str, Any] = {"teachers": n, "added": name, "step_s": seconds[str(n)]}
        row |= {f"{part}_s": seconds[f"{n} {part}"] for part in ("forward", "projectors")}
        if n > 1:
            row["predicted_s"] = seconds[str(n - 1)] + row["forward_s"] + row["projectors_s"]
            row["measured_over_predicted"] = row["step_s"] / row["predicted_s"]
        rows.append(row)
    result = {"batch": BATCH, "threads": torch.get_num_threads(), "rounds": rounds, "rows": rows}
    write_text(HERE / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(HERE / "table.md", table(rows))
    print(table(rows))


def teachers(scratch: Path) -> dict[str, dict[str, Any]]:
    """Recipe entries of five teachers: the shipped two, then three of random weights."""
    specs: dict[str, dict[str, Any]] = {
        "classifier": {"model": str(SHIPPED / "classifier")},
        "segmenter": {"model": str(SHIPPED / "segmenter"), "size": 128},
    }
    for name, make in RANDOM.items():
        torch.manual_seed(0)
        make().save_pretrained(scratch / name)
        specs[name] = {"model": str(scratch / name), "size": SIZE}
    return specs


def build(scratch: Path, specs: dict[str, dict[str, Any]], preserve: float = 1.0) -> Trainer:
    """A trainer before its first step, with fitted standardizers."""
    folder = scratch / "images"
    if not folder.exists():
        folder.mkdir()
        dice = np.random.default_rng(0)
        for i in range(64):
            Image.fromarray(dice.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    recipe = check_recipe(
        {
            "student": {"base": str(SHIPPED / "base")},
            "teachers": specs,
            "out": str(scratch / "run"),
            "images": {"path": str(folder), "size": SIZE, "workers": 0},
            "train": {"batch": BATCH, "steps": 1000, "optimizer": "adamw"},
            "transfer": {"calibration_images": 64, "preserve": preserve},
        }
    )
    trainer = prepare(recipe, {}, DistContext(0, 1, torch.device("cpu")))
    trainer.calibrate()
    return trainer


def images(trainer: Trainer) -> Batch:
    """One batch of noise at every size that the trainer needs."""
    torch.manual_seed(0)
    sizes = trainer.batches.render_sizes
    return Batch(torch.arange(BATCH), {s: torch.randint(0, 256, (BATCH, 3, *s), dtype=torch.uint8) for s in sizes})


def projectors(trainer: Trainer, batch: Batch) -> Callable[[], object]:
    """All that a teacher adds beside its own forward pass, from features of student and teacher that exist already."""
    teacher_features = trainer.teachers(batch)
    with torch.no_grad(), trainer.step.autocast():
        student_features = trainer.student.forward_features(batch.pixels((SIZE, SIZE)))
    parameters = trainer.module.trainable_parameters()
    of_projectors = [p for name, p in parameters.items() if not name.startswith("student.encoder")]
    adamw = torch.optim.AdamW(of_projectors, fused=True)

    def once() -> None:
        leaves = {layer: leaf(features) for layer, features in student_features.items()}
        with trainer.step.autocast():
            loss, _ = trainer.module.compute_loss(leaves, teacher_features, torch.zeros(BATCH, 1))
            loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return once


def leaf(features: Features) -> Features:
    """The same Features as the end of a graph: gradients reach it and stop."""
    return features.map(lambda x: x.detach().requires_grad_())


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job; every round runs all of them, so that drift of the machine hits all alike."""
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in taken.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in milliseconds per image."""
    times = ("step_s", "forward_s", "projectors_s", "predicted_s")
    titles = ("teachers", "added", "step", "its forward", "its projectors", "predicted", "measured / predicted")
    lines = ["ms per image", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        ms = [f"{1000 * row[key] / BATCH:.2f}" if key in row else "-" for key in times]
        ratio = f"{row['measured_over_predicted']:.2f}" if "measured_over_predicted" in row else "-"
        lines.append(f"| {' | '.join([str(row['teachers']), row['added'], *ms, ratio])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
