"""The numbers of the results table: one line for each task and data, one cell for each way to get there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

Row = dict[str, Any]

# kind of a measurement -> title of its column
KINDS = {
    "teacher": "teacher",
    "inherited": "its head on the student",
    "student_probe": "probe on the student",
    "base_probe": "same probe on the base",
    "student_tuned": "student, adapter tuned",
    "base_tuned": "base, adapter tuned",
    "scratch": "from scratch, equal cost",
}
PROBES = ("student_probe", "base_probe", "teacher_probe")
# task -> the metric that is told, by all the names that rows give it, the surest first
METRICS = {
    "classification": ("linear_top1", "top1", "zero_shot_top1"),
    "detection": ("box_AP", "AP"),
    "semantic": ("mIoU",),
    "instance": ("mask_AP",),
}
TASKS = {
    "classification": "Image classification",
    "detection": "Object detection",
    "semantic": "Semantic segmentation",
    "instance": "Instance segmentation",
}
# task -> how its metric is called on the page
NAMES = {"classification": "top-1", "detection": "box AP", "semantic": "mIoU", "instance": "mask AP"}
TASK_FOLDERS = ("classification", "detection", "instances", "semantic")  # they say nothing of whose images they hold


class Cell(NamedTuple):
    """A measured value: the mean over seeds, its interval, how many seeds, and what else has to be said."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        task: a name in `METRICS`.
        data: what it was measured on, in a word or two.
        head: the teacher whose head it is about, where that is known.
        cells: by kind; those that were not measured are absent.
    """

    task: str
    data: str
    head: str | None
    cells: dict[str, Cell]

    @property
    def retention(self) -> float | None:
        """What the teacher's head keeps of its score when the student feeds it."""
        if "inherited" in self.cells and self.cells.get("teacher", Cell(0, None, None, 0)).value > 0:
            return self.cells["inherited"].value / self.cells["teacher"].value
        return None

    @property
    def best(self) -> str | None:
        """The kind with the highest value, the teacher's own apart."""
        values = {kind: cell.value for kind, cell in self.cells.items() if kind != "teacher"}
        return max(values, key=lambda kind: values[kind]) if len(values) > 1 else None


def kind_of(row: Row) -> str:
    """Which way a row was measured: a key of `KINDS`, or ``teacher_probe``."""
    if "kind" in row:
        return str(row["kind"])
    model, tuned = row.get("model"), (row.get("settings") or {}).get("tune")
    if row.get("head"):
        return "inherited" if model == "student" else "teacher"
    if model == "scratch":
        return "scratch"
    if model in ("student", "base"):
        return f"{model}_{'tuned' if tuned else 'probe'}"
    return "teacher_probe"


def data_of(row: Row) -> str:
    """What a row was measured on: the last two folders that say more than the task, wherever they lie."""
    parts = [part for part in PurePath(str(row.get("dataset") or row.get("data") or "")).parts if part != "/"]
    telling = [part for part in parts if part not in TASK_FOLDERS]
    return "/".join((telling or parts)[-2:])


def _in_a_word(data: Iterable[str]) -> dict[str, str]:
    """{data: the last folder of it}; both where that would not tell it from another."""
    last = {one: one.rpartition("/")[2] for one in data}
    return {one: word if list(last.values()).count(word) == 1 else one for one, word in last.items()}


def lines(rows: Iterable[Row]) -> list[Line]:
    """The lines of the table, in the order of `METRICS`."""
    groups: dict[tuple[str, str, Any], list[Row]] = {}
    for row in rows:
        if row.get("task") in METRICS and _is_number(row.get("value")):
            groups.setdefault((row["task"], data_of(row), row.get("n")), []).append(row)
    found = []
    names = {task: _in_a_word({data for of, data, _ in groups if of == task}) for task in METRICS}
    for (task, data, _), group in groups.items():
        heads = list(dict.fromkeys(row["head"] for row in group if row.get("head"))) or [None]
        for head in heads:
            cells = _cells(task, [row for row in group if row.get("head") in (None, head)])
            if cells:
                found.append(Line(task, names[task][data], head, cells))
    return sorted(found, key=lambda line: list(METRICS).index(line.task))


def _cells(task: str, rows: Sequence[Row]) -> dict[str, Cell]:
    by_kind: dict[str, list[Row]] = {}
    for row in _by_one_probe(rows):
        by_kind.setdefault(kind_of(row), []).append(row)
    cells = {kind: cell for kind in KINDS if (cell := _told(task, by_kind.get(kind, []))) is not None}
    if "teacher" not in cells:  # then the best of the probes on teachers stands there
        named = {str(row.get("model")) for row in by_kind.get("teacher_probe", [])}
        probed = {
            name: cell
            for name in sorted(named)
            if (cell := _told(task, [r for r in by_kind["teacher_probe"] if r["model"] == name]))
        }
        if probed:
            best = max(probed, key=lambda name: probed[name].value)
            cells = {"teacher": probed[best]._replace(note=f"probe on {best}")} | cells
    return cells


def _by_one_probe(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of other probes than the one that most models were measured by, the first of them."""
    models: dict[Any, set[str]] = {}
    for row in rows:
        if kind_of(row) in PROBES:
            models.setdefault(_probe_of(row), set()).add(kind_of(row) + str(row.get("model")))
    chosen = max(models, key=lambda probe: len(models[probe]), default=None)
    return [row for row in rows if kind_of(row) not in PROBES or _probe_of(row) == chosen]


def _probe_of(row: Row) -> Any:
    return (row.get("settings") or {}).get("head")


def _told(task: str, rows: Sequence[Row]) -> Cell | None:
    """The metric of a task under the first of its names that the rows give it."""
    return next(filter(None, (_cell(rows, name) for name in METRICS[task])), None)


def _cell(rows: Sequence[Row], metric: str) -> Cell | None:
    """The mean of a metric over seeds with its spread, or of one seed with the interval that was measured."""
    by_seed = {(row.get("seed"), row.get("probe_seed")): row for row in rows if row["metric"] == metric}  # the newest
    values = [float(row["value"]) for row in by_seed.values()]
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) > 1:
        spread = statistics.stdev(values)
        return Cell(mean, mean - spread, mean + spread, len(values))
    (only,) = by_seed.values()
    beside = {row["metric"]: row["value"] for row in rows}
    low, high = (only.get(end, beside.get(f"{metric}_{end}")) for end in ("low", "high"))
    return Cell(mean, low, high, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
