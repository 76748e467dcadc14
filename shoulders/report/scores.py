"""The section with the table of the tasks."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.report import charts
from shoulders.report.gather import Told
from shoulders.report.markup import Html, element, listed, missing, paragraph, section, table
from shoulders.report.results import KINDS, NAMES, TASKS, Cell, Line

EXPLAINED = {
    "inherited": "A teacher’s own head, fed by the student, has seen no label and no training.",
    "student_probe": "A probe is a small head fitted to labels on frozen features, alike on student and base.",
    "student_tuned": "Adapter tuned: that probe and the adapter trained on together with the labels.",
    "scratch": "From scratch: the same architecture, trained with labels alone at equal training cost.",
}
ABSENT = {
    "inherited": "the teachers’ own heads on the student (--heads)",
    "student_probe": "probes on the student",
    "base_probe": "the same probes on the base",
    "scratch": "the same architecture from scratch at equal cost (--models scratch)",
}


def results(told: Told, found: Sequence[Line]) -> Html:
    """The table of the tasks, with what it means and what is missing from it."""
    command = f"shoulders evaluate {told.folder} --task TASK --data PATH"
    if not found:
        said = missing("No task was measured yet. Scores of the heads and of probes come from", f"{command} [--heads]")
        return section("results", "Results", said)
    kinds = [kind for kind in KINDS if any(kind in line.cells for line in found)]
    absent = [what for kind, what in ABSENT.items() if kind not in kinds]
    notes = [missing(f"Not measured here: {listed(absent)}. That is done by", command)] if absent else []
    return section("results", "Results", _explained(kinds, found), _table(kinds, found), *notes)


def _explained(kinds: Sequence[str], found: Sequence[Line]) -> Html:
    said = [what for kind, what in EXPLAINED.items() if kind in kinds]
    if any(line.best for line in found):
        said.append("Bold: the best of a row, the teacher itself apart.")
    if any(cell.low is not None for line in found for cell in line.cells.values()):
        said.append("Small: 95 % intervals, or one standard deviation to both sides over seeds.")
    return paragraph(" ".join(said))


def _table(kinds: Sequence[str], found: Sequence[Line]) -> Html:
    retained = any(line.retention is not None for line in found)
    titles: list[object] = ["task", "at a glance"]
    for kind in kinds:
        titles.append(Html(element("i", class_=f"key {kind}") + KINDS[kind]))
        if kind == "inherited" and retained:
            titles.append("retention")
    rows = [[_task(line), _bars(line, kinds), *_numbers(line, kinds, retained)] for line in found]
    return table("Results on test images, fractions from 0 to 1", titles, rows, "results")


def _task(line: Line) -> Html:
    below = NAMES[line.task] + (f", on {line.data}" if line.data else "")
    head = [element("small", f"head of {line.head}")] if line.head else []
    return Html("".join([element("span", TASKS[line.task]), element("small", below), *head]))


def _bars(line: Line, kinds: Sequence[str]) -> Html:
    values = [(kind, line.cells[kind].value) for kind in kinds if kind in line.cells]
    label = ", ".join(f"{KINDS[kind]} {value:.3f}" for kind, value in values)
    return element("td", charts.bars(values, label), class_="glance")


def _numbers(line: Line, kinds: Sequence[str], retained: bool) -> list[Html]:
    cells = []
    for kind in kinds:
        cells.append(_cell(kind, line.cells.get(kind), best=kind == line.best))
        if kind == "inherited" and retained:
            kept = "–" if line.retention is None else f"{100 * line.retention:.0f} %"
            label = element("span", "retention", class_="label")
            cells.append(element("td", label, element("span", kept), class_="number"))
    return cells


def _cell(kind: str, cell: Cell | None, best: bool) -> Html:
    """A value; its label is shown where the page is too narrow for columns."""
    label = element("span", element("i", class_=f"key {kind}"), KINDS[kind], class_="label")
    if cell is None:
        return element("td", label, element("span", "–"), class_="number none")
    parts: list[object] = [label, element("strong" if best else "span", f"{cell.value:.3f}")]
    if cell.low is not None and cell.high is not None:
        parts.append(element("small", f"{cell.low:.3f}–{cell.high:.3f}"))
    if cell.seeds > 1:
        parts.append(element("small", f"{cell.seeds} seeds"))
    if cell.note:
        parts.append(element("small", cell.note))
    return element("td", *parts, class_="number")
