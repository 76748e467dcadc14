"""The section with the results table."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.report.charts import bar_chart
from shoulders.report.markup import Html, element, list_text, missing, paragraph, section, table
from shoulders.report.record import RunRecord
from shoulders.report.results import KINDS, Cell, Line

EXPLANATIONS = {
    "teacher_head": "Teacher head: the teacher’s own head on the student’s features, without labels or training.",
    "student_probe": "Probe: a small head trained with labels on frozen features, the same for student and base.",
    "concatenated_probe": "Concatenated: the same probe on the features of all teachers side by side, which all run.",
    "student_finetuned": "Adapter finetuned: the probe and the adapter trained together with labels.",
    "scratch": "From scratch: the student’s architecture trained with labels alone, at equal training cost.",
}
ABSENT = {
    "teacher_head": "the teachers’ heads on the student (--heads)",
    "student_probe": "probes on the student",
    "base_probe": "probes on the base",
    "scratch": "the same architecture trained from scratch (--models scratch)",
}


def results_section(record: RunRecord, lines: Sequence[Line]) -> Html:
    """The results table with explanations, and what has not been measured."""
    command = f"shoulders evaluate {record.folder} --task TASK --data PATH"
    if not lines:
        unmeasured = missing("No task has been evaluated yet. Evaluate heads and probes with", f"{command} [--heads]")
        return section("results", "Results", unmeasured)
    kinds = [kind for kind in KINDS if any(kind in line.cells for line in lines)]
    absent = [text for kind, text in ABSENT.items() if kind not in kinds]
    notes = [missing(f"Not measured: {list_text(absent)}. Measure with", command)] if absent else []
    return section("results", "Results", _explanation(kinds, lines), _table(kinds, lines), *notes)


def _explanation(kinds: Sequence[str], lines: Sequence[Line]) -> Html:
    sentences = [text for kind, text in EXPLANATIONS.items() if kind in kinds]
    if any(line.best for line in lines):
        sentences.append("Bold: the best value of a row, without the teacher.")
    if any(cell.low is not None for line in lines for cell in line.cells.values()):
        sentences.append("Small: 95 % intervals, or the mean minus and plus one standard deviation over seeds.")
    return paragraph(" ".join(sentences))


def _table(kinds: Sequence[str], lines: Sequence[Line]) -> Html:
    has_retention = any(line.retention is not None for line in lines)
    titles: list[object] = ["task", "overview"]
    for kind in kinds:
        titles.append(Html(element("i", class_=f"key {kind}") + KINDS[kind]))
        if kind == "teacher_head" and has_retention:
            titles.append("retention")
    rows = [[_task(line), _bars(line, kinds), *_numbers(line, kinds, has_retention)] for line in lines]
    return table("Results on test images, fractions from 0 to 1", titles, rows, "results")


def _task(line: Line) -> Html:
    metric = line.task.metric.title + (f", on {line.data}" if line.data else "")
    head = [element("small", f"head of {line.head}")] if line.head else []
    return Html("".join([element("span", line.task.title), element("small", metric), *head]))


def _bars(line: Line, kinds: Sequence[str]) -> Html:
    values = [(kind, line.cells[kind].value) for kind in kinds if kind in line.cells]
    label = ", ".join(f"{KINDS[kind]} {value:.3f}" for kind, value in values)
    return element("td", bar_chart(values, label), class_="overview")


def _numbers(line: Line, kinds: Sequence[str], has_retention: bool) -> list[Html]:
    cells = []
    for kind in kinds:
        cells.append(_cell(kind, line.cells.get(kind), best=kind == line.best))
        if kind == "teacher_head" and has_retention:
            retention = "–" if line.retention is None else f"{100 * line.retention:.0f} %"
            label = element("span", "retention", class_="label")
            cells.append(element("td", label, element("span", retention), class_="number"))
    return cells


def _cell(kind: str, cell: Cell | None, best: bool) -> Html:
    """A value. Its label is visible only on pages that are too narrow for columns."""
    label = element("span", element("i", class_=f"key {kind}"), KINDS[kind], class_="label")
    if cell is None:
        return element("td", label, element("span", "–"), class_="number none")
    content: list[object] = [label, element("strong" if best else "span", f"{cell.value:.3f}")]
    if cell.low is not None and cell.high is not None:
        content.append(element("small", f"{cell.low:.3f}–{cell.high:.3f}"))
    if cell.seeds > 1:
        content.append(element("small", f"{cell.seeds} seeds"))
    if cell.note:
        content.append(element("small", cell.note))
    return element("td", *content, class_="number")
