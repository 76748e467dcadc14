"""What a cache costs and saves: bytes per view, how fast it is read, and a step with and without it.

    python benchmarks/cache/run.py [--views 1024] [--rounds 5] [--steps 2]

Reading: random batches of 64 views out of the page cache, for the teachers and the base of recipes/world.yaml, each as
far as it is asked about them, and for three ViT-B-sized teachers (a summary and 14 x 14 places of 768 channels each). A
step: recipes/world.yaml as it is, teachers asked live and out of the cache. One thread; CPU seconds, medians of
interleaved rounds: other work on the machine counts less against them than against the clock. Writes results.json and
table.md here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from shoulders.config.recipe import Cache, Recipe, read_recipe
from shoulders.distillation import Run, prepare
from shoulders.distributed.context import DistContext
from shoulders.feature_cache import build_cache, store
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.codec import Codec
from shoulders.feature_cache.index import Index
from shoulders.feature_cache.read import TeacherStore
from shoulders.features import Features
from shoulders.storage.atomic import write_text
from shoulders.teachers import Tap

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "world.yaml"
BATCH = 64
Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in each round")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        caches: dict[str, Recipe] = {}
        rows: list[dict[str, Any]] = []
        jobs: dict[str, Callable[[], None]] = {}
        for dtype in ("int8", "float16"):
            caches[dtype] = recipe(Path(scratch), asked.views, dtype)
            made = build_cache(caches[dtype])
            builder = Builder(caches[dtype], {}, lambda line: None)
            world = [builder.shelf(name) for name in builder.prints]
            lost = [tap["reconstruction_fvu"] for row in made["teachers"] for tap in row["taps"]]
            rows.append({"what": "world", "dtype": dtype, "fvu_lost_most": max(lost)})
            jobs |= reading(f"world {dtype}", world)
            vit = three_vits(Path(scratch) / f"vit-{dtype}", dtype)
            rows.append({"what": "three ViT-B", "dtype": dtype})
            jobs |= reading(f"three ViT-B {dtype}", vit)
            for row, shelves in zip(rows[-2:], (world, vit), strict=True):
                asked_about = zip(shelves, shares(shelves), strict=True)
                row["bytes_per_view"] = round(sum(shelf.shards.record * share for shelf, share in asked_about))
        seconds = interleaved(jobs, asked.rounds)
        for row in rows:
            name = f"{row['what']} {row['dtype']}"
            row |= {"views_per_s": BATCH / seconds[name], "views_per_s_unchecked": BATCH / seconds[f"{name} unchecked"]}
        steps = step_seconds(caches, asked.rounds, asked.steps)
    result = {"threads": 1, "views": asked.views, "rounds": asked.rounds}
    result |= {"batch": caches["int8"].train.batch, "reading": rows, "step_s": steps}
    write_text(HERE / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(HERE / "table.md", table(result))
    print(table(result))


def recipe(scratch: Path, views: int, dtype: str) -> Recipe:
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


class Numbered:
    """Records that belong to no image but their number."""

    def keys(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """As that of `Index`."""
        return [(int(number), 0) for number in numbers]

    def __len__(self) -> int:
        return 512


def three_vits(folder: Path, dtype: str) -> list[TeacherStore]:
    """512 views of random features, as three ViT-B-sized teachers would say."""
    shelves = []
    taps = {"last": Tap(768, 768, (14, 14))}
    for name in ("one", "two", "three"):
        generator = torch.Generator().manual_seed(0)
        told = {
            "last": Features(
                torch.randn(64, 768, generator=generator), torch.randn(64, 196, 768, generator=generator), (14, 14)
            )
        }
        codec = Codec(taps, Cache(dtype=dtype))
        payload = codec.encode(told).numpy()
        (folder / name).mkdir(parents=True)
        for shard in range(2):
            keys = [[(shard * 256 + 64 * part + i, 0) for i in range(64)] for part in range(4)]
            sealed = (store.seal(payload, [0] * 64, part, 7) for part in keys)
            store.write_shard(folder / name / store.SHARD.format(shard), sealed, 0)
        shelf = TeacherStore.__new__(TeacherStore)  # without a plan: there is no teacher that it could be of
        shelf.folder, shelf.command, shelf.codec, shelf.salt = folder / name, "", codec, 7
        shelf.index = cast(Index, Numbered())
        shelf.shards = store.Shards(folder / name, codec.bytes + store.TRAILER, [256, 256])
        shelves.append(shelf)
    return shelves


def shares(shelves: list[TeacherStore]) -> list[float]:
    """Of all views, those that each teacher is asked about."""
    most = max(len(shelf.index) for shelf in shelves)
    return [len(shelf.index) / most for shelf in shelves]


def reading(name: str, shelves: list[TeacherStore]) -> dict[str, Callable[[], None]]:
    """Reading a batch of all teachers to float32, with checksums and without."""
    dice = np.random.default_rng(0)

    def read() -> None:
        for shelf, share in zip(shelves, shares(shelves), strict=True):
            numbers = dice.choice(len(shelf.index), round(BATCH * share), replace=False)
            shelf.told(numbers, torch.device("cpu"))

    def unchecked() -> None:
        sound, store.is_sound = store.is_sound, lambda *args: True
        try:
            read()
        finally:
            store.is_sound = sound

    return {name: read, f"{name} unchecked": unchecked}


def interleaved(jobs: dict[str, Callable[[], None]], rounds: int) -> Seconds:
    """Median CPU seconds of each job, which is run twice before it counts."""
    for job in jobs.values():
        job()
        job()
    told: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(4 * rounds):
        for name, job in jobs.items():
            started = time.process_time()
            job()
            told[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in told.items()}


def step_seconds(caches: dict[str, Recipe], rounds: int, steps: int) -> Seconds:
    """Median CPU seconds of a training step, decoding included, asked live and out of each cache."""
    live = caches["int8"].model_copy(update={"cache": Cache()})
    runs: dict[str, Run] = {}
    for name, one in {"live": live, **caches}.items():
        runs[name] = prepare(one, {}, DistContext(0, 1, torch.device("cpu")))
        runs[name].calibrate()
    told: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            for step, batch in enumerate(run._batches(turn * steps, (turn + 1) * steps, 0, 1), turn * steps + 1):
                run.step(step, batch)
            told[name].append((time.process_time() - started) / steps)
    return {name: statistics.median(seconds[1:]) for name, seconds in told.items()}


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| teachers | stored as | bytes per view | views/s on one core | the same unchecked |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['dtype']} | {row['bytes_per_view']:,} | {row['views_per_s']:,.0f} | "
        f"{row['views_per_s_unchecked']:,.0f} |"
        for row in result["reading"]
    ]
    lines += ["", f"| recipes/world.yaml, batch {result['batch']} | CPU seconds per step | of live |", "|---|---|---|"]
    live = result["step_s"]["live"]
    lines += [f"| {name} | {seconds:.2f} | {seconds / live:.2f} |" for name, seconds in result["step_s"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
