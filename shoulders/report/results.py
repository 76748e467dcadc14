"""The numbers of the results table: a line for each task and data set, a cell for each kind of measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from shoulders.tasks import TASKS, Task

Row = dict[str, Any]

# kind of a measurement -> title of its column
KINDS = {
    "teacher": "teacher",
    "teacher_head": "teacher head",
    "student_probe": "probe on student",
    "base_probe": "probe on base",
    "concatenated_probe": "probe on all teachers, concatenated",
    "student_finetuned": "student, adapter finetuned",
    "base_finetuned": "base, adapter finetuned",
    "scratch": "from scratch",
}
PROBES = ("student_probe", "base_probe", "concatenated_probe", "teacher_probe")


class Cell(NamedTuple):
    """A measured value: the mean over seeds, its interval, the number of seeds, and a note."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        task: the task.
        data: short name of the data set.
        head: the teacher of the head, if it is known.
        cells: by kind; kinds that were not measured are absent.
    """

    task: Task
    data: str
    head: str | None
    cells: dict[str, Cell]

    @property
    def retention(self) -> float | None:
        """The score of the teacher's head on the student, as a fraction of its score on the teacher."""
        if "teacher_head" in self.cells and self.cells.get("teacher", Cell(0, None, None, 0)).value > 0:
            return self.cells["teacher_head"].value / self.cells["teacher"].value
        return None

    @property
    def best(self) -> str | None:
        """The kind with the highest value, without the teacher."""
        values = {kind: cell.value for kind, cell in self.cells.items() if kind != "teacher"}
        return max(values, key=lambda kind: values[kind]) if len(values) > 1 else None


def kind_of(row: Row) -> str:
    """The kind of a measurement: a key of `KINDS`, or ``teacher_probe``."""
    if "kind" in row:
        return str(row["kind"])
    model, finetuned = row.get("model"), (row.get("settings") or {}).get("finetune")
    if row.get("head"):
        return "teacher_head" if model == "student" else "teacher"
    if model == "scratch":
        return "scratch"
    if model == "concatenated":
        return "concatenated_probe"
    if model in ("student", "base"):
        return f"{model}_{'finetuned' if finetuned else 'probe'}"
    return "teacher_probe"


def data_of(row: Row) -> str:
    """The data set of a row: its last two folders that are not named after a task."""
    parts = [part for part in PurePath(str(row.get("dataset") or row.get("data") or "")).parts if part != "/"]
    task_folders = {folder for task in TASKS.values() for folder in task.folders}
    names = [part for part in parts if part not in task_folders]
    return "/".join((names or parts)[-2:])


def _short_names(data: Iterable[str]) -> dict[str, str]:
    """{data: its last folder, or the whole if another data set has the same last folder}."""
    last = {name: name.rpartition("/")[2] for name in data}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def table_lines(rows: Iterable[Row]) -> list[Line]:
    """The lines of the results table, in the order of the tasks.

    Args:
        rows: see `shoulders.report.write_report`.
    """
    groups: dict[tuple[str, str, Any], list[Row]] = {}
    for row in rows:
        if row.get("task") in TASKS and _is_number(row.get("value")):
            groups.setdefault((row["task"], data_of(row), row.get("n")), []).append(row)
    lines = []
    names = {name: _short_names({data for of_task, data, _ in groups if of_task == name}) for name in TASKS}
    for (name, data, _), group in groups.items():
        heads = list(dict.fromkeys(row["head"] for row in group if row.get("head"))) or [None]
        for head in heads:
            cells = _cells(TASKS[name], [row for row in group if row.get("head") in (None, head)])
            if cells:
                lines.append(Line(TASKS[name], names[name][data], head, cells))
    return sorted(lines, key=lambda line: list(TASKS).index(line.task.name))


def _cells(task: Task, rows: Sequence[Row]) -> dict[str, Cell]:
    by_kind: dict[str, list[Row]] = {}
    for row in _drop_other_probes(rows):
        by_kind.setdefault(kind_of(row), []).append(row)
    cells = {kind: cell for kind in KINDS if (cell := _main_cell(task, by_kind.get(kind, []))) is not None}
    if "teacher" not in cells:  # the best of the probes on teachers is shown instead
        models = {str(row.get("model")) for row in by_kind.get("teacher_probe", [])}
        probed = {
            name: cell
            for name in sorted(models)
            if (cell := _main_cell(task, [r for r in by_kind["teacher_probe"] if r["model"] == name]))
        }
        if probed:
            best = max(probed, key=lambda name: probed[name].value)
            cells = {"teacher": probed[best]._replace(note=f"probe on {best}")} | cells
    return cells


def _drop_other_probes(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of other probe heads than the one that most models were measured with."""
    models: dict[Any, set[str]] = {}
    for row in rows:
        if kind_of(row) in PROBES:
            models.setdefault(_probe_of(row), set()).add(kind_of(row) + str(row.get("model")))
    chosen = max(models, key=lambda probe: len(models[probe]), default=None)
    return [row for row in rows if kind_of(row) not in PROBES or _probe_of(row) == chosen]


def _probe_of(row: Row) -> Any:
    return (row.get("settings") or {}).get("head")


def _main_cell(task: Task, rows: Sequence[Row]) -> Cell | None:
    """The main metric of a task, under the first of its names that the rows have."""
    return next(filter(None, (_cell(rows, name) for name in task.metric.in_rows)), None)


def _cell(rows: Sequence[Row], metric: str) -> Cell | None:
    """The mean of a metric over seeds with its standard deviation, or one seed with its measured interval."""
    by_seed = {(row.get("seed"), row.get("probe_seed")): row for row in rows if row["metric"] == metric}  # the latest
    values = [float(row["value"]) for row in by_seed.values()]
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) > 1:
        spread = statistics.stdev(values)
        return Cell(mean, mean - spread, mean + spread, len(values))
    (row,) = by_seed.values()
    others = {other["metric"]: other["value"] for other in rows}
    low, high = (row.get(end, others.get(f"{metric}_{end}")) for end in ("low", "high"))
    return Cell(mean, low, high, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
