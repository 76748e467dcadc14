"""A real job out of a cache and with its teachers live: minutes, and what the students know.

    python benchmarks/cache/real.py --data DATA [--work runs/cache_real] [--only cached|live] [--threads 1]

recipes/real_small.yaml (1,000 photos, the CIFAR-10 and the CamVid training images; no labels), 700 steps of 128. Live,
every view is a fresh one; the cache holds one view of each image, in int8. Then both students and the base are probed
on CIFAR-10. Started again, it goes on. Writes real.json and real.md here.
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
WAYS = ("cached", "live")
METRICS = ("knn_top1", "linear_top1", "10shot_top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cache_real"))
    parser.add_argument("--only", choices=WAYS, help="nothing is written here until both are there")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # before torch is imported
    for way in [given.only] if given.only else WAYS:
        one_way(way, given)
    kept = [given.work / f"{way}.json" for way in WAYS]
    if all(path.exists() for path in kept):
        from shoulders.storage.atomic import write_text

        rows = [json.loads(path.read_text()) for path in kept]
        write_text(HERE / "real.json", json.dumps(rows, indent=1) + "\n")
        write_text(HERE / "real.md", table(rows))
        print(table(rows))


def one_way(way: str, given: argparse.Namespace) -> None:
    """Train and probe; what is there already is not done again."""
    from shoulders.config.recipe import read_recipe
    from shoulders.distillation import distill
    from shoulders.evaluation.evaluate import evaluate
    from shoulders.feature_cache import build_cache
    from shoulders.storage.atomic import write_text

    done = given.work / f"{way}.json"
    if done.exists():
        return
    out, cache = given.work / way, given.work / "cache"
    cached = ["images.views=1", f"cache.path={cache}", "cache.dtype=int8", "cache.mode=require"]
    recipe = read_recipe(
        RECIPE,
        [
            f"images.sources.photos.path={given.data / 'photos'}",
            f"images.sources.cifar10.path={given.data / 'cifar10' / 'train.parquet'}",
            f"images.sources.camvid.path={given.data / 'camvid' / 'images' / 'train'}",
            f"out={out}",
            *(cached if way == "cached" else []),
        ],
    )
    row: dict[str, Any] = {"way": way, "threads": given.threads, "steps": recipe.train.steps}
    if way == "cached":
        made, begun = given.work / "made.json", time.perf_counter()
        if not made.exists():
            build_cache(recipe)
            write_text(made, json.dumps({"making_s": time.perf_counter() - begun}))
        row |= json.loads(made.read_text())
        row["disk_mb"] = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
    row["training_s"] = distill(recipe, resume=True)["seconds"]
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row |= {name: value for name, value in last[-1].items() if name.startswith("fvu")}
    models = ("student", "base") if way == "cached" else ("student",)
    for probe in evaluate(out, "classification", given.data / "cifar10", models):
        if probe["metric"] in METRICS:
            row[f"{probe['model']}/{probe['metric']}"] = probe["value"]
    write_text(done, json.dumps(row))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    fvu = [name for name in rows[0] if name.startswith("fvu/") and name.count("/") == 1]  # the means of teachers
    titles = ("teachers", "minutes to train", "and to make the cache", *fvu, "k-NN", "linear", "10-shot")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        making = f"{row['making_s'] / 60:.1f}" if "making_s" in row else "-"
        cells = [f"{row['training_s'] / 60:.1f}", making, *(f"{row[name]:.3f}" for name in fvu)]
        cells += [f"{100 * row[f'student/{metric}']:.1f}" for metric in METRICS]
        lines.append(f"| {' | '.join([row['way'], *cells])} |")
    base = [f"{100 * rows[0][f'base/{metric}']:.1f}" for metric in METRICS]
    lines.append(f"| {' | '.join(['(the base)', *['-'] * (2 + len(fvu)), *base])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
