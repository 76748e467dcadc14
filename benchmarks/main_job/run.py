"""A comparison on real images: KPU, only s2t, and only s2t with MSE and without standardization.

All students have the same base, the same two teachers, the same unlabelled images and the same number of steps. Then
student, base and teachers are probed on CIFAR-10. An interrupted run continues when it is started again.

    python benchmarks/main_job/run.py --data DATA [--seeds 0 1 2] [--steps 1000]

DATA holds photos/, cifar10/{train,test}.parquet and camvid/images/train/; see benchmarks/teachers/README.md.
Writes results.json and table.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from shoulders.config.recipe import read_recipe
from shoulders.distillation import distill
from shoulders.evaluation.evaluate import evaluate
from shoulders.storage.atomic import write_text

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "real_small.yaml"
# variant: its changes to the recipe
VARIANTS: dict[str, list[str]] = {
    "kpu": [],
    "s2t": ["transfer.t2s=none"],
    "s2t, mse, no standardize": ["transfer.t2s=none", "transfer.distance=mse", "transfer.standardize=none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="default: as in the recipe")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=Path("runs/main_job"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for variant in args.variants:
            rows += one_run(variant, VARIANTS[variant], seed, args)
    rows += references(args)
    for row in rows:
        row.pop("data", None)  # a path of this machine
    if args.variants == list(VARIANTS):
        write_text(HERE / "results.json", json.dumps(rows, indent=1) + "\n")
        write_text(HERE / "table.md", table(rows))
        print(table(rows))


def one_run(variant: str, changes: list[str], seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Distil and probe one variant; finished parts are not repeated."""
    out = folder(variant, seed, args)
    steps = [] if args.steps is None else [f"train.steps={args.steps}"]
    recipe = read_recipe(
        RECIPE,
        [
            f"images.sources.photos.path={args.data / 'photos'}",
            f"images.sources.cifar10.path={args.data / 'cifar10' / 'train.parquet'}",
            f"images.sources.camvid.path={args.data / 'camvid' / 'images' / 'train'}",
            f"train.seed={seed}",
            f"out={out}",
            *changes,
            *steps,
        ],
    )
    done = out / "done.json"
    if not done.exists():
        summary = distill(recipe, resume=True)
        probes = evaluate(out, "classification", args.data / "cifar10", ("student",))
        write_text(done, json.dumps({"seconds": summary["seconds"], "probes": probes}))
    saved = json.loads(done.read_text())
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in log if row["kind"] == "evaluation"]
    speed = statistics.median(row["images_per_s"] for row in log if row["kind"] == "train")
    common = {"variant": variant, "seed": seed, "steps": recipe.train.steps, "batch": recipe.train.batch}
    rows = [
        common | {"model": "student", "task": "inheritance", "metric": name, "value": row[name], "at_step": row["step"]}
        for row in (evaluations[0], evaluations[-1])
        for name in row
        if name.startswith("fvu")
    ]
    rows.append(common | {"model": "student", "task": "speed", "metric": "images_per_s", "value": speed})
    rows.append(common | {"model": "student", "task": "speed", "metric": "seconds", "value": saved["seconds"]})
    return rows + [common | probe for probe in saved["probes"]]


def references(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Probes of the base and the teachers, measured once: they are the same in every run."""
    rows: list[dict[str, Any]] = []
    out = folder(args.variants[0], args.seeds[0], args)
    for name in ("base", *read_recipe(RECIPE).teachers):
        done = args.runs / f"{name}.json"
        if not done.exists():
            write_text(done, json.dumps(evaluate(out, "classification", args.data / "cifar10", (name,))))
        rows += json.loads(done.read_text())
    return rows


def folder(variant: str, seed: int, args: argparse.Namespace) -> Path:
    """The run folder of a variant and seed."""
    return args.runs / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: fvu per teacher and spread at start and end, and the probes; mean +- deviation over seeds."""
    measures = ["fvu/classifier", "fvu/segmenter", "fvu/base", "fvu_spread"]
    probes = ["knn_top1", "linear_top1", "10shot_top1"]
    last = max(row.get("at_step", 0) for row in rows)
    some = rows[0]["variant"]
    lines = ["Probes on CIFAR-10 test, %.", ""]
    lines += ["| variant | " + " | ".join(measures + probes) + " |", "|---" * (1 + len(measures + probes)) + "|"]
    lines.append(
        "| *step 0, the base* | "
        + " | ".join(
            [_cell(rows, measure, 1, variant=some, at_step=0) for measure in measures]
            + [_cell(rows, probe, 100, model="base") for probe in probes]
        )
        + " |"
    )
    for variant in VARIANTS:
        lines.append(
            f"| {variant} | "
            + " | ".join(
                [_cell(rows, measure, 1, variant=variant, at_step=last) for measure in measures]
                + [_cell(rows, probe, 100, variant=variant, model="student") for probe in probes]
            )
            + " |"
        )
    for teacher in ("classifier", "segmenter"):
        cells = [_cell(rows, probe, 100, model=teacher) for probe in probes]
        lines.append(f"| *teacher: {teacher}* | " + " | ".join(["-"] * len(measures) + cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]], metric: str, scale: float, **match: Any) -> str:
    values = [
        scale * row["value"]
        for row in rows
        if row["metric"] == metric and all(row.get(key) == value for key, value in match.items())
    ]
    if not values:
        return "-"
    digits = 1 if scale == 100 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
