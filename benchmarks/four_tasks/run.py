"""Four tasks out of one encoder: the teachers, their heads on the student, probes, and training from scratch.

    python benchmarks/four_tasks/run.py --data DATA [--work runs/four_tasks] [--only world|real] [--seeds 0 1 2]

`world` is recipes/world.yaml, whose scenes are drawn; `real` is recipes/real_four.yaml, with DATA as
benchmarks/teachers/README.md describes it. Each student is distilled once for each seed. Then each task is measured on
the test images: its teacher, the teacher's head on the student (inherited), probes on the student and on its base, and
the same architecture from scratch with all labels at the FLOPs of the distillation. Everything is kept in
WORK/results.json as soon as it is measured, and a killed run that is started again goes on. Then results.json and
table.md beside this file and the table in docs/four_tasks.md are written, and pictures of teacher and student side by
side in the run folders.

Changes to a recipe stand at the end: ... --only real train.steps=2000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
from jobs import KINDS, SETTINGS, Setting
from kept import Kept, Row, publish
from side_by_side import draw_sheets
from tables import DOC, insert, table

from shoulders.storage.atomic import write_text

HERE = Path(__file__).resolve().parent


def run(setting: Setting, kept: Kept, given: argparse.Namespace) -> None:
    """Everything that is missing of a setting, what is cheap first."""
    labels = setting.labels(given.work, given.data)
    if "teacher" in given.kinds:
        for job in setting.jobs:
            missing(kept, partial(measure.by_teacher, job, setting, labels), dataset=job.dataset, kind="teacher")
    folders = {}
    for seed in given.seeds if set(given.kinds) - {"teacher"} else ():
        folders[seed] = measure.distilled(setting, given.work, given.data, seed, given.overrides)
        for job in setting.jobs if "teacher_head" in given.kinds else ():
            missing(
                kept,
                partial(measure.inherited, job, folders[seed], labels, seed),
                dataset=job.dataset,
                kind="teacher_head",
                seed=seed,
            )
    first = given.seeds[0]
    if "teacher_head" in given.kinds:
        docs = None if setting.sources else given.doc.parent  # of real photos, the terms allow no copies there
        draw_sheets(setting, folders[first], labels, kept.rows, docs)
    for job in setting.jobs:
        for kind in ("student_probe", "base_probe"):
            if kind in given.kinds:
                probe(job, kind, kept, folders[first], labels, first, given.probe_seeds)
    for job in setting.jobs if "scratch" in given.kinds else ():
        missing(
            kept,
            partial(measure.from_scratch, job, folders[first], labels, first, given.scratch_steps),
            dataset=job.dataset,
            kind="scratch",
        )


def missing(kept: Kept, measured: Callable[[], list[Row]], **what: Any) -> None:
    """Measure and keep, unless there is such a row."""
    if not kept.has(**what):
        kept.keep(measured())


def probe(job: Any, kind: str, kept: Kept, folder: Path, labels: Path, seed: int, probe_seeds: list[int]) -> None:
    """The fits that are missing."""
    absent = [at for at in probe_seeds if not kept.has(dataset=job.dataset, kind=kind, probe_seed=at)]
    if absent:
        for rows in measure.by_probe(job, folder, labels, kind, seed, absent):
            kept.keep(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe")
    parser.add_argument("--data", type=Path, help="the folder of real images; see benchmarks/teachers/README.md")
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of distillations; the first one is probed")
    parser.add_argument("--probe-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scratch-steps", type=int, help="default: as many as cost what the distillation did")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and table.md go")
    parser.add_argument("--doc", type=Path, default=DOC, help="the page that holds the table")
    given = parser.parse_intermixed_args(arguments)
    kept = Kept(given.work / "results.json")
    for name in [given.only] if given.only else SETTINGS:
        run(SETTINGS[name], kept, given)
    told = table(publish(kept.rows, given.out / "results.json"))
    write_text(given.out / "table.md", told)
    insert("four tasks", told, given.doc)
    print(told)


if __name__ == "__main__":
    main()
