"""The cost and the benefit of a cache: bytes per view, reading speed, and a training step with and without it.

    python benchmarks/cache/run.py [--views 1024] [--rounds 5] [--steps 2]

Reading: random batches of 64 views from the page cache. For the teachers and the base of recipes/world.yaml, each reads
the images of its sources; three teachers of the size of ViT-B have a summary and 14 x 14 tokens of 768 channels each.
Step: recipes/world.yaml as it is, with live teachers and with the cache. One thread; medians of CPU seconds over
interleaved rounds, which depend less on other work on the machine than the clock does. Writes results.json and table.md
to this folder.
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
from torch import Tensor, nn

from shoulders.config.recipe import Recipe, check_recipe, read_recipe
from shoulders.config.sections import Cache
from shoulders.distillation import Trainer, prepare
from shoulders.distributed.context import DistContext
from shoulders.feature_cache import build_cache
from shoulders.feature_cache.spec import CacheSpec
from shoulders.feature_cache.teacher_store import TeacherStore
from shoulders.features import Features
from shoulders.storage.atomic import write_text
from shoulders.teachers import Teacher
from shoulders.world import TEACHERS

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "world.yaml"
BATCH = 64
VIT_VIEWS = 512
Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in each round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        recipes = {dtype: world_recipe(Path(scratch), args.views, dtype) for dtype in ("int8", "float16")}
        rows: list[dict[str, Any]] = []
        jobs: dict[str, Callable[[], None]] = {}
        for dtype, recipe in recipes.items():
            info = build_cache(recipe)
            fvu = [tap["reconstruction_fvu"] for row in info["teachers"] for tap in row["taps"]]
            world, vits = open_stores(recipe, {}), three_vits(Path(scratch), dtype)
            rows.append({"teachers": "world", "dtype": dtype, "max_reconstruction_fvu": max(fvu)})
            rows.append({"teachers": "three ViT-B", "dtype": dtype})
            for row, stores in zip(rows[-2:], (world, vits), strict=True):
                weighted = zip(stores, fractions(stores), strict=True)
                row["bytes_per_view"] = round(sum(store.shards.record_bytes * part for store, part in weighted))
                jobs |= reading(f"{row['teachers']} {dtype}", stores)
        seconds = interleaved(jobs, args.rounds)
        for row in rows:
            name = f"{row['teachers']} {row['dtype']}"
            row["views_per_s"] = BATCH / seconds[name]
            row["views_per_s_unverified"] = BATCH / seconds[f"{name} unverified"]
        steps = step_seconds(recipes, args.rounds, args.steps)
    result = {"threads": 1, "views": args.views, "rounds": args.rounds}
    result |= {"batch": recipes["int8"].train.batch, "reading": rows, "step_s": steps}
    write_text(HERE / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(HERE / "table.md", table(result))
    print(table(result))


def world_recipe(scratch: Path, views: int, dtype: str) -> Recipe:
    """recipes/world.yaml with fewer images and a cache."""
    styles = ("studio", "neon", "paper", "ink")
    counts = [f"images.sources.{style}.args.count={views // len(styles)}" for style in styles]
    return read_recipe(
        RECIPE,
        [
            *counts,
            "images.views=1",
            "images.workers=0",
            "images.holdout=64",
            "transfer.calibration_images=64",
            f"cache.path={scratch / dtype}",
            f"cache.dtype={dtype}",
            "cache.mode=require",
            f"out={scratch / 'run'}",
        ],
    )


class RandomFeatures(nn.Module):
    """A teacher of the size of ViT-B; its features are random numbers."""

    summary: Tensor
    spatial: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("summary", torch.randn(BATCH, 768, generator=generator))
        self.register_buffer("spatial", torch.randn(BATCH, 14 * 14, 768, generator=generator))

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        """The same features for every batch of at most 64 images."""
        return {"last": Features(self.summary[: len(pixels)], self.spatial[: len(pixels)], (14, 14))}


def three_vits(scratch: Path, dtype: str) -> list[TeacherStore]:
    """The stores of three teachers of the size of ViT-B, with 512 views."""
    source = {"module": "shoulders.world:unlabelled", "args": {"styles": ["studio"], "count": VIT_VIEWS}}
    recipe = check_recipe(
        {
            "student": {"base": str(TEACHERS / "base")},
            "images": {"sources": {"world": source}, "size": 96, "views": 1, "workers": 0},
            "transfer": {"preserve": 0.0},
            "cache": {"path": str(scratch / f"vit-{dtype}"), "dtype": dtype},
            "out": str(scratch / "run"),
        }
    )
    # the teachers receive batches of 64 images at this size
    teachers = {name: Teacher(RandomFeatures(), size=(256, 512)) for name in ("one", "two", "three")}
    build_cache(recipe, extra_teachers=teachers)
    return open_stores(recipe, teachers)


def open_stores(recipe: Recipe, extra_teachers: dict[str, Teacher]) -> list[TeacherStore]:
    """The stores of a complete cache."""
    spec = CacheSpec(recipe, extra_teachers)
    return [spec.store(name) for name in spec.fingerprints]


def fractions(stores: list[TeacherStore]) -> list[float]:
    """The fraction of all views that each teacher has."""
    largest = max(len(store.index) for store in stores)
    return [len(store.index) / largest for store in stores]


def reading(name: str, stores: list[TeacherStore]) -> dict[str, Callable[[], None]]:
    """Jobs that read a batch of all teachers as float32: with and without verifying the records."""
    rng = np.random.default_rng(0)

    def read(stores: list[TeacherStore]) -> None:
        for store, fraction in zip(stores, fractions(stores), strict=True):
            numbers = rng.choice(len(store.index), round(BATCH * fraction), replace=False)
            store.features(numbers, torch.device("cpu"))

    unverified = [
        TeacherStore(one.index, one.codec, one.shards, one.salt, one.size, one.command, verify=False) for one in stores
    ]
    return {name: partial(read, stores), f"{name} unverified": partial(read, unverified)}


def interleaved(jobs: dict[str, Callable[[], None]], rounds: int) -> Seconds:
    """Median CPU seconds of each job, after two runs for warm-up."""
    for job in jobs.values():
        job()
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(4 * rounds):
        for name, job in jobs.items():
            started = time.process_time()
            job()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def step_seconds(recipes: dict[str, Recipe], rounds: int, steps: int) -> Seconds:
    """Median CPU seconds of a training step with decoding, with live teachers and with each cache."""
    live = recipes["int8"].model_copy(update={"cache": Cache()})
    runs: dict[str, Trainer] = {}
    for name, one in {"live": live, **recipes}.items():
        runs[name] = prepare(one, {}, DistContext(0, 1, torch.device("cpu")))
        runs[name].calibrate()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            for step, batch in enumerate(run.batches.training(turn * steps, (turn + 1) * steps), turn * steps + 1):
                run.step(step, batch)
            times[name].append((time.process_time() - started) / steps)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| teachers | stored as | bytes per view | views/s on one core | the same unverified |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['teachers']} | {row['dtype']} | {row['bytes_per_view']:,} | {row['views_per_s']:,.0f} | "
        f"{row['views_per_s_unverified']:,.0f} |"
        for row in result["reading"]
    ]
    lines += [
        "",
        f"| recipes/world.yaml, batch {result['batch']} | CPU seconds per step | of live teachers |",
        "|---|---|---|",
    ]
    live = result["step_s"]["live"]
    lines += [f"| {name} | {seconds:.2f} | {seconds / live:.2f} |" for name, seconds in result["step_s"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
