"""Each teacher of the small world evaluated on its own task, on the test scenes of every style.

    python benchmarks/world/cross.py --work runs/cross [--test 500]

Writes cross.json in this folder: rows of teacher, task, style, metric, value.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from shoulders.config.sections import TeacherSpec
from shoulders.inference import head_on_teacher
from shoulders.tasks import TASKS
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head
from shoulders.world import STYLES, TEACHER_TASKS, TEACHERS, write_world


def evaluate_teachers(world: Path) -> list[dict[str, object]]:
    """A row for each teacher and style."""
    rows: list[dict[str, object]] = []
    for name, (task, _, folder) in TEACHER_TASKS.items():
        spec = TeacherSpec(model=str(TEACHERS / name))
        teacher = load_teacher(name, spec)
        head = head_on_teacher(load_head(name, spec, teacher), teacher)
        for style in STYLES:
            scores = TASKS[task].evaluate_head(head, TASKS[task].find_splits(world / style / folder, "image"), 50, 0)
            value = next(row["value"] for row in scores if row["metric"] == TASKS[task].metric.in_heads)
            rows.append(
                {
                    "teacher": name,
                    "task": task,
                    "style": style,
                    "metric": TASKS[task].metric.in_heads,
                    "value": round(value, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The rows as a Markdown table with one line for each teacher."""
    lines = [f"| teacher (task, metric) | {' | '.join(STYLES)} |", "|---|" + "---|" * len(STYLES)]
    for name, (task, _, _) in TEACHER_TASKS.items():
        cells = [f"{row['value']:.3f}" for row in rows if row["teacher"] == name]
        lines.append(f"| {name} ({task}, {TASKS[task].metric.in_heads}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/cross"))
    parser.add_argument("--test", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    write_world(args.work, counts={"train": 50, "val": 0, "test": args.test})
    rows = evaluate_teachers(args.work)
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
