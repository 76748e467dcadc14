"""What the heads keep when their taps are inherited on the student's grid instead of their own finer ones.

    python benchmarks/four_tasks/own_grids.py --data DATA [--work runs/four_tasks] [--only world|real] [overrides]

Distils the student of run.py once more with transfer.own_grids=false, measures the heads of both, and writes
own_grids.json and own_grids.md beside this file and the table in docs/four_tasks.md. Started again, it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure
from jobs import SETTINGS, Job
from kept import Kept, Row, publish
from run import missing
from tables import DOC, JOBS, METRIC_NAMES, insert, line_of, number, retention

from shoulders.checkpoint import write_text

HERE = Path(__file__).resolve().parent
VARIANTS: dict[str, list[str]] = {"own grids": [], "the student's grid": ["transfer.own_grids=false"]}


def heads(job: Job, run: Path, labels: Path, seed: int, variant: str) -> list[Row]:
    """What the heads of a variant score."""
    return [row | {"variant": variant} for row in measure.inherited(job, run, labels, seed)]


def table(rows: Sequence[Row]) -> str:
    """A line for each data set and metric; both variants beside the teacher."""
    titles = ["data set (metric)", "teacher", *VARIANTS, *(f"retention, {name}" for name in VARIANTS)]
    lines = [line_of(titles), "|---" * len(titles) + "|"]
    for job in JOBS:
        for metric in job.metrics:
            found = [row for row in rows if (row["dataset"], row["metric"]) == (job.dataset, metric)]
            teacher = [row for row in found if row["kind"] == "teacher"]
            both = [[row for row in found if row.get("variant") == name] for name in VARIANTS]
            kept = [retention(teacher, head) for head in both]
            if teacher and any(both):
                shares = ["-" if share is None else f"{share:.2f}" for share in kept]
                what = f"{job.dataset} ({METRIC_NAMES[metric]})"
                lines.append(line_of([what, *map(number, [teacher, *both]), *shares]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, the same as of run.py")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--doc", type=Path, default=DOC)
    given = parser.parse_intermixed_args()
    kept = Kept(given.work / "own_grids.json")
    for name in [given.only] if given.only else SETTINGS:
        setting = SETTINGS[name]
        labels = setting.labels(given.work, given.data)
        for job in setting.jobs:
            missing(kept, partial(measure.by_teacher, job, setting, labels), dataset=job.dataset, kind="teacher")
        for variant, changes in VARIANTS.items():
            work = given.work / "own_grids" if changes else given.work
            run = measure.distilled(setting, work, given.data, given.seed, [*given.overrides, *changes])
            for job in setting.jobs:
                missing(kept, partial(heads, job, run, labels, given.seed, variant),
                        dataset=job.dataset, kind="inherited", variant=variant, seed=given.seed)  # fmt: skip
    told = table(publish(kept.rows, given.out / "own_grids.json"))
    write_text(given.out / "own_grids.md", told)
    insert("own grids", told, given.doc)
    print(told)


if __name__ == "__main__":
    main()
