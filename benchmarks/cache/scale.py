"""The cost of more images: building their cache, and training with it.

    python benchmarks/cache/scale.py [--images 1000 4000 16000 50000] [--steps 200]

The classifier of the small world and its scenes of one style. For each number of images, one process builds the cache
and another one trains with it. CPU seconds of one thread; memory is resident memory, including Python and torch. The
time should grow linearly and the memory should stay the same. Writes scale.json and scale.md to this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORLD = HERE.parents[1] / "shoulders" / "world" / "teachers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000, 16000, 50000])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--child", nargs=2, metavar=("JOB", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job, folder = args.child
        print(json.dumps(JOBS[job](Path(folder), args.images[0], args.steps)))
        return
    rows = []
    for images in args.images:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"images": images, "steps": args.steps}
            for job in JOBS:
                row |= child(job, folder, images, args.steps)
            rows.append(row)
    from shoulders.storage.atomic import write_text

    write_text(HERE / "scale.json", json.dumps(rows, indent=1) + "\n")
    write_text(HERE / "scale.md", table(rows))
    print(table(rows))


def child(job: str, folder: str, images: int, steps: int) -> dict[str, Any]:
    """The figures of a job, measured in a child process."""
    command = [sys.executable, __file__, "--child", job, folder, "--images", str(images), "--steps", str(steps)]
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{job} of {images} images failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def recipe(folder: Path, images: int) -> Any:
    from shoulders.config.recipe import check_recipe

    return check_recipe(
        {
            "student": {"base": str(WORLD / "base"), "adapter": {"kind": "side", "width": 64}},
            "teachers": {"classifier": {"model": str(WORLD / "classifier")}},
            "images": {
                "sources": {
                    "world": {"module": "shoulders.world:unlabelled", "args": {"styles": ["studio"], "count": images}}
                },
                "size": 96,
                "views": 1,
                "holdout": 64,
                "workers": 0,
            },
            "transfer": {"calibration_images": 64},
            "train": {"batch": 16, "steps": 10_000},
            "cache": {"path": str(folder / "cache"), "dtype": "int8", "mode": "require"},
            "out": str(folder / "run"),
        }
    )


def build(folder: Path, images: int, steps: int) -> dict[str, float]:
    """Build the cache."""
    from shoulders.feature_cache import build_cache

    started = time.process_time()
    build_cache(recipe(folder, images))
    size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    return {"build_s": time.process_time() - started, "build_peak_mb": peak_mb(), "disk_mb": size / 1e6}


def train(folder: Path, images: int, steps: int) -> dict[str, float]:
    """Open the run and train for some steps on views of the whole cache."""
    import torch

    from shoulders.distillation import prepare
    from shoulders.distributed.context import DistContext

    started = time.process_time()
    run = prepare(recipe(folder, images), {}, DistContext(0, 1, torch.device("cpu")))
    open_s = time.process_time() - started
    run.calibrate()
    started = time.process_time()
    for step, batch in enumerate(run.batches.training(0, steps), 1):
        run.step(step, batch)
    return {"open_s": open_s, "step_ms": (time.process_time() - started) / steps * 1000, "train_peak_mb": peak_mb()}


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


JOBS = {"build": build, "train": train}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    titles = (
        "images",
        "build: ms per image",
        "peak MB",
        "MB on disk",
        "opening a run: s",
        "ms per step of 16",
        "peak MB of training",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        each = 1000 * row["build_s"] / row["images"]
        cells = [
            f"{row['images']:,}",
            f"{each:.2f}",
            f"{row['build_peak_mb']:.0f}",
            f"{row['disk_mb']:.0f}",
            f"{row['open_s']:.2f}",
            f"{row['step_ms']:.0f}",
            f"{row['train_peak_mb']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
