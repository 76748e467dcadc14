"""Four tasks out of one encoder, on the small world: the teachers, their heads on the student, and probes.

    python benchmarks/four_tasks/run.py --work runs/four_tasks [--seeds 0 1 2] [train.steps=2000 ...]

Distils recipes/world.yaml (once for each seed; what is finished is not run again), then measures each task on
the test scenes of its teacher's style: the teacher itself, its head on the student (inherited), a probe on the student
and the same probe on the base. Writes results.json beside this file: rows of dataset, task, kind, metric, value, seed,
seconds; and table.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shoulders.checkpoint import write_text
from shoulders.distill import distill
from shoulders.evaluate import evaluate, evaluate_heads
from shoulders.recipe import read_recipe
from shoulders.world import write_world

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "world.yaml"
# task -> teacher, its style, metric, folder of a style that holds the labels
JOBS = {
    "classification": ("classifier", "studio", "top1", "classification"),
    "detection": ("detector", "neon", "AP", "instances"),
    "semantic": ("segmenter", "paper", "mIoU", "semantic"),
    "instance": ("instances", "ink", "AP", "instances"),
}
PROBES = {"classification": "linear_top1", "detection": "AP", "semantic": "mIoU", "instance": "mask_AP"}


def measure(run: Path, world: Path, seed: int, probes: bool) -> list[dict[str, Any]]:
    """Rows of one student."""
    rows = []
    for task, (teacher, style, metric, folder) in JOBS.items():
        data = world / style / folder
        common = {"dataset": f"world/{style}", "task": task, "seed": seed}
        for row in evaluate_heads(run, task, data, ["student", teacher], batch=50, workers=0):
            if row["head"] == teacher and row["metric"] in (metric, f"{metric}_low", f"{metric}_high"):
                kind = "inherited" if row["model"] == "student" else "teacher"
                rows.append({**common, "kind": kind, **{key: row[key] for key in ("metric", "value", "seconds")}})
        for row in evaluate(run, task, data, ["student", "base"], seed=seed, workers=0) if probes else ():
            if row["metric"] == PROBES[task]:
                kind = f"{row['model']}_probe"
                rows.append({**common, "kind": kind, **{key: row[key] for key in ("metric", "value", "seconds")}})
        for row in rows:
            if row["task"] == task:
                print({key: value for key, value in row.items() if key != "seconds"}, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown; retention is what the student keeps of its teacher."""
    lines = ["| task (metric) | teacher | its head on the student | retention | probe on the student | on the base |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for task, (_, style, metric, _) in JOBS.items():
        cells = {}
        for kind in ("teacher", "inherited", "student_probe", "base_probe"):
            wanted = PROBES[task] if kind.endswith("probe") else metric
            values = [r["value"] for r in rows if (r["task"], r["kind"], r["metric"]) == (task, kind, wanted)]
            cells[kind] = sum(values) / len(values) if values else float("nan")
        kept = cells["inherited"] / cells["teacher"]
        told = [f"{cells[kind]:.3f}" for kind in ("teacher", "inherited")] + [f"{kept:.2f}"]
        told += [f"{cells[kind]:.3f}" for kind in ("student_probe", "base_probe")]
        lines.append(f"| {task}, {style} ({metric}) | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heads-only", action="store_true", help="no probes")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    write_world(given.work / "world")
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        run = given.work / f"seed-{seed}"
        recipe = read_recipe(RECIPE, [*given.overrides, f"train.seed={seed}", f"out={run}"])
        distill(recipe, resume=(run / "recipe.yaml").exists())
        rows += measure(run, given.work / "world", seed, not given.heads_only)
    write_text(given.out / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(given.out / "table.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
