"""Four tasks with one encoder: the teachers, their heads on the student, probes, and training from scratch.

    python benchmarks/four_tasks/run.py --data DATA [--work runs/four_tasks] [--only world|real] [--seeds 0 1 2]

`world` is recipes/world.yaml, with drawn scenes; `real` is recipes/real_four.yaml, with the DATA that
benchmarks/teachers/README.md describes. A student is distilled for each seed. Then these are evaluated on the test
images of each task: the teacher, the teacher head on the student, probes on the student and on its base, and the same
architecture trained from scratch with all labels at the FLOPs of the distillation. Each result is written to
WORK/results.json at once, and the same command resumes an interrupted benchmark. At the end the script writes
results.json and table.md in this folder, the table in docs/four_tasks.md, and pictures of teacher and student side by
side in the run folders.

Changes to a recipe are the last arguments: ... --only real train.steps=2000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
from jobs import KINDS, SETTINGS, Job, Setting
from row_file import Row, RowFile, publish
from side_by_side import draw_sheets
from tables import DOC, insert, table

from shoulders.storage.atomic import write_text

HERE = Path(__file__).resolve().parent


def run_setting(setting: Setting, file: RowFile, args: argparse.Namespace) -> None:
    """Measure everything of a setting that the file does not have yet, the cheapest first."""
    labels = setting.labels(args.work, args.data)
    if "teacher" in args.kinds:
        for job in setting.jobs:
            measure_once(
                file, partial(measure.evaluate_teacher, job, setting, labels), dataset=job.dataset, kind="teacher"
            )
    folders = {}
    for seed in args.seeds if set(args.kinds) - {"teacher"} else ():
        folders[seed] = measure.distill_setting(setting, args.work, args.data, seed, args.overrides)
        for job in setting.jobs if "teacher_head" in args.kinds else ():
            measure_once(
                file,
                partial(measure.evaluate_teacher_head, job, folders[seed], labels, seed),
                dataset=job.dataset,
                kind="teacher_head",
                seed=seed,
            )
    first = args.seeds[0]
    if "teacher_head" in args.kinds:
        docs = None if setting.sources else args.doc.parent  # the terms of the real photos allow no copies
        draw_sheets(setting, folders[first], labels, file.rows, docs)
    for job in setting.jobs:
        for kind in ("student_probe", "base_probe"):
            if kind in args.kinds:
                measure_probes(job, kind, file, folders[first], labels, first, args.probe_seeds)
    for job in setting.jobs if "scratch" in args.kinds else ():
        measure_once(
            file,
            partial(measure.evaluate_from_scratch, job, folders[first], labels, first, args.scratch_steps),
            dataset=job.dataset,
            kind="scratch",
        )


def measure_once(file: RowFile, measure_rows: Callable[[], list[Row]], **match: Any) -> None:
    """Measure and add rows, unless the file has a row with the values of ``match``."""
    if not file.has(**match):
        file.add(measure_rows())


def measure_probes(
    job: Job, kind: str, file: RowFile, folder: Path, labels: Path, seed: int, probe_seeds: list[int]
) -> None:
    """Measure and add the probes that the file does not have yet."""
    missing = [each for each in probe_seeds if not file.has(dataset=job.dataset, kind=kind, probe_seed=each)]
    if missing:
        for rows in measure.evaluate_probes(job, folder, labels, kind, seed, missing):
            file.add(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe")
    parser.add_argument("--data", type=Path, help="the folder of real images; see benchmarks/teachers/README.md")
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the distillations; probes are on the first"
    )
    parser.add_argument("--probe-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scratch-steps", type=int, help="default: as many as have the FLOPs of the distillation")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and table.md")
    parser.add_argument("--doc", type=Path, default=DOC, help="the page with the table")
    args = parser.parse_intermixed_args(arguments)
    file = RowFile(args.work / "results.json")
    for name in [args.only] if args.only else SETTINGS:
        run_setting(SETTINGS[name], file, args)
    text = table(publish(file.rows, args.out / "results.json"))
    write_text(args.out / "table.md", text)
    insert("four tasks", text, args.doc)
    print(text)


if __name__ == "__main__":
    main()
