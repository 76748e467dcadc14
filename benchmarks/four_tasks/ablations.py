"""What the heads keep when one thing of the recipe is another: the grids that taps are inherited on, the adapter.

    python benchmarks/four_tasks/ablations.py match_teacher_grid [--data DATA] [--work DIR] [--only world|real]
    python benchmarks/four_tasks/ablations.py adapters --only world

Distils a student for each variant and measures the teachers' heads on it. Writes ablations/NAME.json and NAME.md beside
this file and the table in docs/four_tasks.md. Started again, it goes on.
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
from tables import DOC, JOBS, insert, line_of, mean, number, retention, short

from shoulders.storage.atomic import write_text

HERE = Path(__file__).resolve().parent
INSIDE, LOW_RANK, SIDE, CONV = (
    f"student.adapter={{{adapter}}}"
    for adapter in (
        "kind: bottleneck, width: 128",
        "kind: lora, rank: 64",
        "kind: side, width: 128",
        "kind: conv, width: 128",
    )
)
# {ablation: {variant: changes to the recipe}}
ABLATIONS: dict[str, dict[str, list[str]]] = {
    "match_teacher_grid": {
        "own grids": ["train.steps=800"],
        "the student's grid": ["train.steps=800", "transfer.match_teacher_grid=false"],
    },
    # with each 800 steps; then as many as fit the time of the first, which takes 290 ms a step on one core, the others
    # 341, 225 and 259 (processor time, medians of six steps taken in turns; `shoulders plan` says the like)
    "adapters": {
        "bottleneck, 800 steps": [INSIDE, "train.steps=800"],
        "lora, 800": [LOW_RANK, "train.steps=800"],
        "side, 800": [SIDE, "train.steps=800"],
        "conv, 800": [CONV, "train.steps=800"],
        "lora, 680": [LOW_RANK, "train.steps=680"],
        "side, 1030": [SIDE, "train.steps=1030"],
        "conv, 900": [CONV, "train.steps=900"],
    },
}


def heads(job: Job, run: Path, labels: Path, seed: int, variant: str) -> list[Row]:
    """What the heads of a variant score."""
    return [row | {"variant": variant} for row in measure.inherited(job, run, labels, seed)]


def table(variants: Sequence[str], rows: Sequence[Row]) -> str:
    """A line for a data set and metric, a column for a variant: its value, and what that keeps of the teacher's."""
    titles = ["data set (metric)", "teacher", *variants]
    lines = [line_of(titles), "|---" * len(titles) + "|"]
    for job in JOBS:
        for metric in job.metrics:
            found = [row for row in rows if (row["dataset"], row["metric"]) == (job.dataset, metric)]
            teacher = [row for row in found if row["kind"] == "teacher"]
            scores = [[row for row in found if row.get("variant") == name] for name in variants]
            if teacher and any(scores):
                shares = [retention(teacher, score) for score in scores]
                cells = [
                    "-" if share is None else f"{short(mean(score))} ({share:.2f})"
                    for score, share in zip(scores, shares, strict=True)
                ]
                lines.append(line_of([f"{job.dataset} ({job.metrics[metric].title})", number(teacher), *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=ABLATIONS)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, the same as of run.py")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "ablations")
    parser.add_argument("--doc", type=Path, default=DOC)
    given = parser.parse_intermixed_args()
    name, variants = given.ablation, ABLATIONS[given.ablation]
    kept = Kept(given.work / name / "rows.json")
    for setting in [SETTINGS[given.only]] if given.only else SETTINGS.values():
        labels = setting.labels(given.work, given.data)
        for job in setting.jobs:
            missing(kept, partial(measure.by_teacher, job, setting, labels), dataset=job.dataset, kind="teacher")
        for variant, changes in variants.items():
            work = given.work / name / variant.replace(", ", "-").replace(" ", "_")
            run = measure.distilled(setting, work, given.data, given.seed, [*given.overrides, *changes])
            for job in setting.jobs:
                missing(
                    kept,
                    partial(heads, job, run, labels, given.seed, variant),
                    dataset=job.dataset,
                    kind="teacher_head",
                    variant=variant,
                    seed=given.seed,
                )
    given.out.mkdir(exist_ok=True)
    told = table(list(variants), publish(kept.rows, given.out / f"{name}.json"))
    write_text(given.out / f"{name}.md", told)
    insert(name.replace("_", " "), told, given.doc)
    print(told)


if __name__ == "__main__":
    main()
