"""Rows as Markdown tables: values with intervals and standard deviations, and the retention."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs import ROOT, SETTINGS, Job

from shoulders.storage.atomic import write_text

Row = dict[str, Any]

DOC = ROOT / "docs" / "four_tasks.md"
MIN_TEACHER_AP = 0.25  # the retention of a weaker teacher means nothing
JOBS = tuple(job for setting in SETTINGS.values() for job in setting.jobs)
TITLES = (
    "data set",
    "task (metric)",
    "teacher",
    "teacher head",
    "retention",
    "probe on student",
    "probe on base",
    "from scratch",
)


def table(rows: Sequence[Row]) -> str:
    """A line for each data set and metric that was measured."""
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
    ratio = retention(of_kind["teacher"], of_kind["teacher_head"])
    weak = metric.endswith("AP") and bool(of_kind["teacher"]) and mean(of_kind["teacher"]) < MIN_TEACHER_AP
    return [
        job.dataset,
        f"{job.task} ({job.metrics[metric].title})",
        number(of_kind["teacher"]),
        number(of_kind["teacher_head"]),
        "- (teacher AP < .25)" if weak else "-" if ratio is None else f"{ratio:.2f}",
        *(number(of_kind[kind]) for kind in ("student_probe", "base_probe", "scratch")),
    ]


def retention(teacher: Sequence[Row], teacher_head: Sequence[Row]) -> float | None:
    """The score of the teacher head on the student, as a fraction of the teacher's; None if one was not measured."""
    return mean(teacher_head) / mean(teacher) if teacher and teacher_head and mean(teacher) else None


def mean(rows: Sequence[Row]) -> float:
    """Mean value over seeds."""
    return statistics.mean(row["value"] for row in rows)


def number(rows: Sequence[Row]) -> str:
    """``.623 ± .004 (.601 to .652)``: mean and standard deviation over seeds, and the mean of their intervals."""
    if not rows:
        return "-"
    text = short(mean(rows))
    if len(rows) > 1:
        text += f" ± {short(statistics.stdev(row['value'] for row in rows))}"
    if all("low" in row for row in rows):
        low, high = (short(statistics.mean(row[side] for row in rows)) for side in ("low", "high"))
        text += f" ({low} to {high})"
    return text


def short(value: float) -> str:
    """``.623``: a fraction without the leading zero."""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def line_of(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def insert(name: str, text: str, doc: Path = DOC) -> None:
    """Write a table to a page, between its two markers.

    Raises:
        SystemExit: the page does not have them.
    """
    begin, end = f"<!-- {name}: written by its script -->\n", f"<!-- end of {name} -->"
    page = doc.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{doc}: does not have the markers {begin.strip()} and {end}")
    before, rest = page.split(begin, 1)
    write_text(doc, before + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1])
