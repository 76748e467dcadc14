"""One student at other input sizes than that of its training: teacher heads, k-NN and a linear probe.

    python benchmarks/four_tasks/sizes.py --data DATA [--work runs/four_tasks] [--only world|real] [--seed 0]

Evaluates the students that run.py left in WORK. Sizes are the multiples of the patch nearest to half, three quarters,
one, one and a half and two times the size of the training. Heads keep their own grids, to which features are resized.
Probes for classification use at most 5,000 training images and 2,000 test images. Writes sizes.json and sizes.md in
this folder, and the table in docs/four_tasks.md. The same command resumes an interrupted benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import SETTINGS, Job, name_in_rows
from measure import subsample
from row_file import Row, RowFile, publish
from tables import DOC, JOBS, insert, line_of, short

from shoulders.distributed.device import this_device
from shoulders.inference import features_of_student, head_on_student
from shoulders.model import ShouldersModel, load
from shoulders.storage.atomic import write_text
from shoulders.tasks import TASKS

HERE = Path(__file__).resolve().parent
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)
BATCH = 20  # small: twice the size has four times the tokens


def sizes_of(student: ShouldersModel) -> dict[float, tuple[int, int]]:
    """{factor: (h, w) in px}, multiples of the patch."""
    patch, trained = student.encoder.patch_size, student.config.image_size
    return {
        factor: (max(1, round(trained[0] * factor / patch)) * patch, max(1, round(trained[1] * factor / patch)) * patch)
        for factor in FACTORS
    }


def evaluate_at_size(job: Job, kind: str, student: ShouldersModel, splits: Any, size: tuple[int, int]) -> list[Row]:
    """Scores of the teacher head or of probes on the student, at an input size (h, w) in px."""
    if kind == "teacher_head":
        scores = TASKS[job.task].evaluate_head(head_on_student(student, job.teacher, size), splits, BATCH, 0)
    else:
        scores = TASKS[job.task].fit_probe(features_of_student(student, size), splits, [size], BATCH, 0, 0)
    by_metric = {row["metric"]: row for row in scores}
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
    """A line for each data set, metric and kind of head; a column for each factor."""
    titles = ["data set (metric)", "head", *(f"{factor:g}x" for factor in FACTORS)]
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
                    head = "teacher head" if kind == "teacher_head" else "probe"
                    lines.append(line_of([f"{job.dataset} ({job.metrics[metric].title})", head, *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0, help="of the student")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--doc", type=Path, default=DOC)
    args = parser.parse_args()
    file = RowFile(args.work / "sizes.json")
    for name in [args.only] if args.only else SETTINGS:
        setting = SETTINGS[name]
        run, labels = args.work / name / f"seed-{args.seed}", setting.labels(args.work, args.data)
        student = load(run).to(this_device())
        for job in setting.jobs:
            splits = TASKS[job.task].find_splits(labels / job.labels, "image")
            splits = subsample(splits) if not TASKS[job.task].needs_spatial else splits
            for kind in ("teacher_head", "student_probe") if not TASKS[job.task].needs_spatial else ("teacher_head",):
                for factor, size in sizes_of(student).items():
                    match = {"dataset": job.dataset, "kind": kind, "factor": factor, "seed": args.seed}
                    if not file.has(**match):
                        rows = evaluate_at_size(job, kind, student, splits, size)
                        file.add([{**match, "size": list(size), **row} for row in rows])
    text = table(publish(file.rows, args.out / "sizes.json"))
    write_text(args.out / "sizes.md", text)
    insert("sizes", text, args.doc)
    print(text)


if __name__ == "__main__":
    main()
