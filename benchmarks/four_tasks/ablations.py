"""Ablations: the retention with one setting of the recipe changed, the grids of taps or the kind of adapter.

    python benchmarks/four_tasks/ablations.py match_teacher_grid [--data DATA] [--work DIR] [--only world|real]
    python benchmarks/four_tasks/ablations.py adapters --only world

Distils a student for each variant and evaluates the teacher heads on it. Writes ablations/NAME.json and NAME.md in this
folder and the table in docs/four_tasks.md. The same command resumes an interrupted benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure
from jobs import SETTINGS, Job
from row_file import Row, RowFile, publish
from run import measure_once
from tables import DOC, JOBS, insert, line_of, mean, number, retention, short

from shoulders.storage.atomic import write_text

HERE = Path(__file__).resolve().parent
BOTTLENECK, LORA, SIDE, CONV = (
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
        "teacher's grid": ["train.steps=800"],
        "student's grid": ["train.steps=800", "transfer.match_teacher_grid=false"],
    },
    # 800 steps of each; then as many steps as take the time of the first. A step of the first takes 290 ms on one core,
    # one of the others 341, 225 and 259 ms (processor time, medians of six alternating steps; `shoulders plan`
    # estimates nearly the same)
    "adapters": {
        "bottleneck, 800 steps": [BOTTLENECK, "train.steps=800"],
        "lora, 800": [LORA, "train.steps=800"],
        "side, 800": [SIDE, "train.steps=800"],
        "conv, 800": [CONV, "train.steps=800"],
        "lora, 680": [LORA, "train.steps=680"],
        "side, 1030": [SIDE, "train.steps=1030"],
        "conv, 900": [CONV, "train.steps=900"],
    },
}


def evaluate_variant(job: Job, run: Path, labels: Path, seed: int, variant: str) -> list[Row]:
    """Scores of the teacher head on the student of a variant."""
    return [row | {"variant": variant} for row in measure.evaluate_teacher_head(job, run, labels, seed)]


def table(variants: Sequence[str], rows: Sequence[Row]) -> str:
    """A line for each data set and metric, and a column for each variant: its score and, in brackets, its retention."""
    titles = ["data set (metric)", "teacher", *variants]
    lines = [line_of(titles), "|---" * len(titles) + "|"]
    for job in JOBS:
        for metric in job.metrics:
            measured = [row for row in rows if (row["dataset"], row["metric"]) == (job.dataset, metric)]
            teacher = [row for row in measured if row["kind"] == "teacher"]
            scores = [[row for row in measured if row.get("variant") == name] for name in variants]
            if teacher and any(scores):
                ratios = [retention(teacher, score) for score in scores]
                cells = [
                    "-" if ratio is None else f"{short(mean(score))} ({ratio:.2f})"
                    for score, ratio in zip(scores, ratios, strict=True)
                ]
                lines.append(line_of([f"{job.dataset} ({job.metrics[metric].title})", number(teacher), *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=ABLATIONS)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, as in run.py")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "ablations")
    parser.add_argument("--doc", type=Path, default=DOC)
    args = parser.parse_intermixed_args()
    name, variants = args.ablation, ABLATIONS[args.ablation]
    file = RowFile(args.work / name / "rows.json")
    for setting in [SETTINGS[args.only]] if args.only else SETTINGS.values():
        labels = setting.labels(args.work, args.data)
        for job in setting.jobs:
            measure_once(
                file, partial(measure.evaluate_teacher, job, setting, labels), dataset=job.dataset, kind="teacher"
            )
        for variant, changes in variants.items():
            work = args.work / name / variant.replace(", ", "-").replace(" ", "_")
            run = measure.distill_setting(setting, work, args.data, args.seed, [*args.overrides, *changes])
            for job in setting.jobs:
                measure_once(
                    file,
                    partial(evaluate_variant, job, run, labels, args.seed, variant),
                    dataset=job.dataset,
                    kind="teacher_head",
                    variant=variant,
                    seed=args.seed,
                )
    args.out.mkdir(exist_ok=True)
    text = table(list(variants), publish(file.rows, args.out / f"{name}.json"))
    write_text(args.out / f"{name}.md", text)
    insert(name.replace("_", " "), text, args.doc)
    print(text)


if __name__ == "__main__":
    main()
