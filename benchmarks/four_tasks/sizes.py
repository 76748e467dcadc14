"""One student at other input sizes than that of its training: its heads, k-NN and a linear probe.

    python benchmarks/four_tasks/sizes.py --data DATA [--work runs/four_tasks] [--only world|real] [--seed 0]

Asks the students that run.py left in WORK. Sizes are multiples of the patch next to half, three quarters, one, one and
a half and two times that of the training; the heads' own grids stay what they are, so features are resized to them. For
classification at most 5,000 images are fitted on and 2,000 reported. Goes on where it was killed; writes sizes.json
and sizes.md beside this file, and the table in docs/four_tasks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import SETTINGS, Job, name_in_rows
from kept import Kept, Row, publish
from measure import fewer
from tables import DOC, JOBS, insert, line_of, short

from shoulders.distributed.device import this_device
from shoulders.inference import features_of_student, head_on_student
from shoulders.model import ShouldersModel, load
from shoulders.storage.atomic import write_text
from shoulders.tasks import TASKS

HERE = Path(__file__).resolve().parent
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)
BATCH = 20  # at twice the size four times the places


def sizes_of(student: ShouldersModel) -> dict[float, tuple[int, int]]:
    """{factor: (h, w) in px}, multiples of the patch."""
    patch, trained = student.encoder.patch_size, student.config.image_size
    return {
        factor: (max(1, round(trained[0] * factor / patch)) * patch, max(1, round(trained[1] * factor / patch)) * patch)
        for factor in FACTORS
    }


def measured(job: Job, kind: str, student: ShouldersModel, splits: Any, size: tuple[int, int]) -> list[Row]:
    """By the teacher's head on the student, or by probes on the student, at a size."""
    if kind == "teacher_head":
        told = TASKS[job.task].evaluate_head(head_on_student(student, job.teacher, size), splits, BATCH, 0)
    else:
        told = TASKS[job.task].fit_probe(features_of_student(student, size), splits, size, BATCH, 0, 0)
    by_metric = {row["metric"]: row for row in told}
    names = {metric: name_in_rows(names, kind) for metric, names in job.metrics.items()}
    return [
        {
            "metric": metric,
            "value": by_metric[name]["value"],
            "n": by_metric[name]["n"],
            "seconds": by_metric[name]["seconds"],
        }
        for metric, name in names.items()
        if name is not None
    ]


def table(rows: Sequence[Row]) -> str:
    """A line for each data set, who answers and metric; a column for each factor."""
    titles = ["data set (metric)", "by", *(f"{factor:g}x" for factor in FACTORS)]
    lines = [line_of(titles), "|---" * len(titles) + "|"]
    for job in JOBS:
        for kind in ("teacher_head", "student_probe"):
            for metric in job.metrics:
                values = {
                    row["factor"]: row["value"]
                    for row in rows
                    if (row["dataset"], row["kind"], row["metric"]) == (job.dataset, kind, metric)
                }
                if values:
                    cells = [short(values[factor]) if factor in values else "-" for factor in FACTORS]
                    by = "the teacher's head" if kind == "teacher_head" else "probe"
                    lines.append(line_of([f"{job.dataset} ({job.metrics[metric].title})", by, *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0, help="of the student")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--doc", type=Path, default=DOC)
    given = parser.parse_args()
    kept = Kept(given.work / "sizes.json")
    for name in [given.only] if given.only else SETTINGS:
        setting = SETTINGS[name]
        run, labels = given.work / name / f"seed-{given.seed}", setting.labels(given.work, given.data)
        student = load(run).to(this_device())
        for job in setting.jobs:
            splits = TASKS[job.task].find_splits(labels / job.labels, "image")
            splits = fewer(splits) if job.task == "classification" else splits
            for kind in ("teacher_head", "student_probe") if job.task == "classification" else ("teacher_head",):
                for factor, size in sizes_of(student).items():
                    what = {"dataset": job.dataset, "kind": kind, "factor": factor, "seed": given.seed}
                    if not kept.has(**what):
                        rows = measured(job, kind, student, splits, size)
                        kept.keep([{**what, "size": list(size), **row} for row in rows])
    told = table(publish(kept.rows, given.out / "sizes.json"))
    write_text(given.out / "sizes.md", told)
    insert("sizes", told, given.doc)
    print(told)


if __name__ == "__main__":
    main()
