"""A real job with a cache and with live teachers: minutes, and the accuracy of the students.

    python benchmarks/cache/real.py --data DATA [--work runs/cache_real] [--only cached|live] [--threads 1]

recipes/real_small.yaml (1,000 photos, the CIFAR-10 and the CamVid training images; no labels), 700 steps of 128. With
live teachers every view is fresh; the cache holds one view of each image, in int8. Then probes are fitted on CIFAR-10
with both students and the base. Started again, the script continues. Writes real.json and real.md to this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "real_small.yaml"
KINDS = ("cached", "live")
METRICS = ("knn_top1", "linear_top1", "10shot_top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cache_real"))
    parser.add_argument("--only", choices=KINDS, help="the table is written when both are done")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    for kind in [args.only] if args.only else KINDS:
        train_and_probe(kind, args)
    results = [args.work / f"{kind}.json" for kind in KINDS]
    if all(path.exists() for path in results):
        from shoulders.storage.atomic import write_text

        rows = [json.loads(path.read_text()) for path in results]
        write_text(HERE / "real.json", json.dumps(rows, indent=1) + "\n")
        write_text(HERE / "real.md", table(rows))
        print(table(rows))


def train_and_probe(kind: str, args: argparse.Namespace) -> None:
    """Train a student and fit the probes, unless that is done already."""
    from shoulders.config.recipe import read_recipe
    from shoulders.distillation import distill
    from shoulders.evaluation.evaluate import evaluate
    from shoulders.feature_cache import build_cache
    from shoulders.storage.atomic import write_text

    done = args.work / f"{kind}.json"
    if done.exists():
        return
    out, cache = args.work / kind, args.work / "cache"
    cached = ["images.views=1", f"cache.path={cache}", "cache.dtype=int8", "cache.mode=require"]
    recipe = read_recipe(
        RECIPE,
        [
            f"images.sources.photos.path={args.data / 'photos'}",
            f"images.sources.cifar10.path={args.data / 'cifar10' / 'train.parquet'}",
            f"images.sources.camvid.path={args.data / 'camvid' / 'images' / 'train'}",
            f"out={out}",
            *(cached if kind == "cached" else []),
        ],
    )
    row: dict[str, Any] = {"kind": kind, "threads": args.threads, "steps": recipe.train.steps}
    if kind == "cached":
        built, started = args.work / "built.json", time.perf_counter()
        if not built.exists():
            build_cache(recipe)
            write_text(built, json.dumps({"build_s": time.perf_counter() - started}))
        row |= json.loads(built.read_text())
        row["disk_mb"] = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
    row["training_s"] = distill(recipe, resume=True)["seconds"]
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row |= {name: value for name, value in last[-1].items() if name.startswith("fvu")}
    models = ("student", "base") if kind == "cached" else ("student",)
    for probe in evaluate(out, "classification", args.data / "cifar10", models):
        if probe["metric"] in METRICS:
            row[f"{probe['model']}/{probe['metric']}"] = probe["value"]
    write_text(done, json.dumps(row))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    fvu = [name for name in rows[0] if name.startswith("fvu/") and name.count("/") == 1]  # the mean of each teacher
    titles = ("teachers", "minutes to train", "and to build the cache", *fvu, "k-NN", "linear", "10-shot")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        build = f"{row['build_s'] / 60:.1f}" if "build_s" in row else "-"
        cells = [f"{row['training_s'] / 60:.1f}", build, *(f"{row[name]:.3f}" for name in fvu)]
        cells += [f"{100 * row[f'student/{metric}']:.1f}" for metric in METRICS]
        lines.append(f"| {' | '.join([row['kind'], *cells])} |")
    base = [f"{100 * rows[0][f'base/{metric}']:.1f}" for metric in METRICS]
    lines.append(f"| {' | '.join(['(the base)', *['-'] * (2 + len(fvu)), *base])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
