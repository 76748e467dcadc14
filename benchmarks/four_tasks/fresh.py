"""The world's student on scenes of another seed: nobody has looked at them while recipes were being chosen.

    python benchmarks/four_tasks/fresh.py [--work runs/four_tasks] [--seed 0]

The retention of run.py is on the test scenes by which kinds of adapters, places, distances and lengths of training were
held against each other (LOG.md). This asks the student that run.py left in WORK, and its teachers, about scenes of seed
1. Goes on where it was killed; writes fresh.json and fresh.md beside this file, and the table in docs/four_tasks.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs import SETTINGS
from kept import Kept, Row, publish
from measure import by_teacher, inherited
from tables import DOC, insert, line_of, number, retention

from shoulders.storage.atomic import write_text
from shoulders.world import write_world

HERE = Path(__file__).resolve().parent
WORLD = SETTINGS["world"]
OTHER_SEED = 1  # of the scenes
TITLES = ("data set (metric)", "teacher", "its head on the student", "retention", "on the scenes of the table above")


def table(fresh: Sequence[Row], known: Sequence[Row]) -> str:
    """A line for each data set and metric: what was measured on fresh scenes, and retention on those well known."""
    lines = [line_of(TITLES), "|---" * len(TITLES) + "|"]
    for job in WORLD.jobs:
        for metric in job.metrics:
            teacher, student, known_teacher, known_student = (
                [row for row in rows if (row["dataset"], row["metric"], row["kind"]) == (job.dataset, metric, kind)]
                for rows in (fresh, known)
                for kind in ("teacher", "teacher_head")
            )
            shares = retention(teacher, student), retention(known_teacher, known_student)
            if shares[0] is not None:
                kept = ["-" if share is None else f"{share:.3f}" for share in shares]
                name = f"{job.dataset} ({job.metrics[metric].title})"
                lines.append(line_of([name, number(teacher), number(student), *kept]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--seed", type=int, default=0, help="of the student")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--doc", type=Path, default=DOC)
    given = parser.parse_args()
    run, scenes = given.work / "world" / f"seed-{given.seed}", given.work / "fresh"
    kept = Kept(given.work / "fresh.json")
    write_world(scenes, seed=OTHER_SEED)
    for job in WORLD.jobs:
        if not kept.has(dataset=job.dataset, kind="teacher"):
            kept.keep(by_teacher(job, WORLD, scenes))
        if not kept.has(dataset=job.dataset, kind="teacher_head", seed=given.seed):
            kept.keep(inherited(job, run, scenes, given.seed))
    known = json.loads((HERE / "results.json").read_text())
    told = table(publish(kept.rows, given.out / "fresh.json"), known)
    write_text(given.out / "fresh.md", told)
    insert("fresh", told, given.doc)
    print(told)


if __name__ == "__main__":
    main()
