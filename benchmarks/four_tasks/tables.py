"""Rows as Markdown: values with their intervals and deviations, and what the student keeps of its teacher."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs import ROOT, SETTINGS, Job

from shoulders.storage.atomic import write_text

Row = dict[str, Any]

DOC = ROOT / "docs" / "four_tasks.md"
LEAST_AP = 0.25  # a teacher below this knows too little for what a student keeps of it to mean something
JOBS = tuple(job for setting in SETTINGS.values() for job in setting.jobs)
TITLES = (
    "data set",
    "task (metric)",
    "teacher",
    "its head on the student",
    "retention",
    "probe on the student",
    "probe on the base",
    "from scratch",
)


def table(rows: Sequence[Row]) -> str:
    """A line for each data set and metric, of those that were measured."""
    lines = [line_of(TITLES), "|---" * len(TITLES) + "|"]
    for job in JOBS:
        for metric in job.metrics:
            of_metric = [row for row in rows if (row["dataset"], row["metric"]) == (job.dataset, metric)]
            if of_metric:
                lines.append(line_of(_cells(job, metric, of_metric)))
    return "\n".join(lines) + "\n"


def _cells(job: Job, metric: str, rows: Sequence[Row]) -> list[str]:
    of_kind = {
        kind: [row for row in rows if row["kind"] == kind]
        for kind in ("teacher", "teacher_head", "student_probe", "base_probe", "scratch")
    }
    kept = retention(of_kind["teacher"], of_kind["teacher_head"])
    weak = metric.endswith("AP") and bool(of_kind["teacher"]) and mean(of_kind["teacher"]) < LEAST_AP
    return [
        job.dataset,
        f"{job.task} ({job.metrics[metric].title})",
        number(of_kind["teacher"]),
        number(of_kind["teacher_head"]),
        "teacher AP < .25: not claimed" if weak else "-" if kept is None else f"{kept:.2f}",
        *(number(of_kind[kind]) for kind in ("student_probe", "base_probe", "scratch")),
    ]


def retention(teacher: Sequence[Row], inherited: Sequence[Row]) -> float | None:
    """What the teacher's head keeps on the student, as a share of the teacher's own value; None where one is absent."""
    return mean(inherited) / mean(teacher) if teacher and inherited and mean(teacher) else None


def mean(rows: Sequence[Row]) -> float:
    """Mean value over seeds."""
    return statistics.mean(row["value"] for row in rows)


def number(rows: Sequence[Row]) -> str:
    """``.623 ± .004 (.601 to .652)``: deviation of several seeds, and the mean of their intervals if they have any."""
    if not rows:
        return "-"
    told = short(mean(rows))
    if len(rows) > 1:
        told += f" ± {short(statistics.stdev(row['value'] for row in rows))}"
    if all("low" in row for row in rows):
        low, high = (short(statistics.mean(row[side] for row in rows)) for side in ("low", "high"))
        told += f" ({low} to {high})"
    return told


def short(value: float) -> str:
    """``.623``: a fraction without the zero before the point."""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def line_of(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def insert(name: str, text: str, doc: Path = DOC) -> None:
    """Put a table into a page, between its two markers.

    Raises:
        SystemExit: the page lacks them.
    """
    begin, end = f"<!-- {name}: written by its script -->\n", f"<!-- end of {name} -->"
    page = doc.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{doc}: lacks the markers {begin.strip()} and {end}")
    before, rest = page.split(begin, 1)
    write_text(doc, before + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1])
