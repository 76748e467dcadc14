"""The student of the small world on scenes of another seed, which were not used to select any setting.

    python benchmarks/four_tasks/fresh.py [--work runs/four_tasks] [--seed 0]

run.py evaluates on the test scenes that adapters, layers, distances and the length of training were selected on
(LOG.md). This script evaluates the student that run.py left in WORK, and its teachers, on scenes of seed 1. It writes
fresh.json and fresh.md in this folder, and the table in docs/four_tasks.md. The same command resumes an interrupted
benchmark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs import SETTINGS
from measure import evaluate_teacher, evaluate_teacher_head
from row_file import Row, RowFile, publish
from tables import DOC, insert, line_of, number, retention

from shoulders.storage.atomic import write_text
from shoulders.world import write_world

HERE = Path(__file__).resolve().parent
WORLD = SETTINGS["world"]
SCENE_SEED = 1
TITLES = ("data set (metric)", "teacher", "teacher head", "retention", "retention in the table above")


def table(fresh: Sequence[Row], known: Sequence[Row]) -> str:
    """A line for each data set and metric: the scores on the fresh scenes, and the retention on both sets of scenes."""
    lines = [line_of(TITLES), "|---" * len(TITLES) + "|"]
    for job in WORLD.jobs:
        for metric in job.metrics:
            teacher, student, known_teacher, known_student = (
                [row for row in rows if (row["dataset"], row["metric"], row["kind"]) == (job.dataset, metric, kind)]
                for rows in (fresh, known)
                for kind in ("teacher", "teacher_head")
            )
            ratios = retention(teacher, student), retention(known_teacher, known_student)
            if ratios[0] is not None:
                cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
                name = f"{job.dataset} ({job.metrics[metric].title})"
                lines.append(line_of([name, number(teacher), number(student), *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--seed", type=int, default=0, help="of the student")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--doc", type=Path, default=DOC)
    args = parser.parse_args()
    run, scenes = args.work / "world" / f"seed-{args.seed}", args.work / "fresh"
    file = RowFile(args.work / "fresh.json")
    write_world(scenes, seed=SCENE_SEED)
    for job in WORLD.jobs:
        if not file.has(dataset=job.dataset, kind="teacher"):
            file.add(evaluate_teacher(job, WORLD, scenes))
        if not file.has(dataset=job.dataset, kind="teacher_head", seed=args.seed):
            file.add(evaluate_teacher_head(job, run, scenes, args.seed))
    known = json.loads((HERE / "results.json").read_text())
    text = table(publish(file.rows, args.out / "fresh.json"), known)
    write_text(args.out / "fresh.md", text)
    insert("fresh", text, args.doc)
    print(text)


if __name__ == "__main__":
    main()
