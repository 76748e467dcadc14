"""The numbers of the results table: the cell of each row."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from shoulders.report.results import table_lines
from tests.report.conftest import result_rows

INK, OTHER = Path("/a/world/ink/instances"), Path("/b/world/ink/instances")


def evaluated() -> list[dict[str, Any]]:
    """Rows of `evaluate` and `evaluate --heads` for instance segmentation; AP is that of boxes."""
    return [
        *result_rows("masker", "instance", INK, "masker", mask_AP=0.8, mask_AP_low=0.7, mask_AP_high=0.9, AP=0.99),
        *result_rows("student", "instance", INK, "masker", mask_AP=0.4, mask_AP_low=0.3, mask_AP_high=0.5, AP=0.98),
        *result_rows("student", "instance", OTHER, AP=0.97, mask_AP=0.5),
        *result_rows("base", "instance", OTHER, AP=0.96, mask_AP=0.3),
        *result_rows("concatenated", "instance", OTHER, AP=0.94, mask_AP=0.45),
        *result_rows("scratch", "instance", OTHER, AP=0.95, mask_AP=0.2),
        *result_rows("student", "inheritance", INK, fvu_spread=1.4),
    ]


def test_a_line_has_a_cell_for_each_kind_of_measurement() -> None:
    (line,) = table_lines(evaluated())
    assert (line.task.name, line.data, line.head) == ("instance", "ink", "masker")
    values = {kind: cell.value for kind, cell in line.cells.items()}
    probes = {"student_probe": 0.5, "base_probe": 0.3, "concatenated_probe": 0.45}
    assert values == {"teacher": 0.8, "teacher_head": 0.4, **probes, "scratch": 0.2}
    assert (line.cells["teacher"].low, line.cells["teacher"].high) == (0.7, 0.9)
    assert line.retention == pytest.approx(0.5)
    assert line.best == "student_probe"  # the teacher is excluded


def test_data_sets_with_the_same_last_folder_are_not_mixed() -> None:
    rows = [
        *result_rows("student", "classification", Path("/data/cifar10/prepared"), linear_top1=0.9),
        *result_rows("base", "classification", Path("/data/cifar10/prepared"), linear_top1=0.8),
        *result_rows("student", "classification", Path("/data/cifar100/prepared"), linear_top1=0.5),
    ]
    values = {line.data: {kind: cell.value for kind, cell in line.cells.items()} for line in table_lines(rows)}
    assert values == {
        "cifar10/prepared": {"student_probe": 0.9, "base_probe": 0.8},
        "cifar100/prepared": {"student_probe": 0.5},
    }


def test_rows_with_a_kind_give_the_same_cells() -> None:
    (line,) = table_lines(evaluated())
    rows = [
        {
            "dataset": "world/ink",
            "task": "instance",
            "kind": kind,
            "metric": "mask_AP",
            "value": cell.value,
            "low": cell.low,
            "high": cell.high,
            "seed": None if kind == "teacher" else 0,
        }
        for kind, cell in line.cells.items()
    ]
    (again,) = table_lines(rows)
    assert again.cells == line.cells and again.data == line.data


def test_seeds_are_averaged_and_the_latest_measurement_of_each_is_used() -> None:
    common = {"task": "detection", "kind": "teacher_head", "metric": "AP"}
    values = [0.4, 0.5, 0.9]
    rows = [{**common, "value": 0.1, "seed": 2}, *({**common, "value": v, "seed": s} for s, v in enumerate(values))]
    (line,) = table_lines(rows)
    cell = line.cells["teacher_head"]
    assert (cell.value, cell.seeds) == (pytest.approx(0.6), 3)
    assert cell.high is not None and cell.high - cell.value == pytest.approx(statistics.stdev(values))


def test_finetuned_adapters_are_not_probes() -> None:
    rows = result_rows("student", "semantic", INK, mIoU=0.3)
    finetuned = [{**row, "value": 0.5, "settings": {"finetune": "adapter"}} for row in rows]
    (line,) = table_lines(rows + finetuned)
    assert {kind: cell.value for kind, cell in line.cells.items()} == {"student_probe": 0.3, "student_finetuned": 0.5}


def test_student_and_base_are_compared_with_the_same_probe_head() -> None:
    def with_head(head: str, model: str, value: float) -> list[dict[str, Any]]:
        return [{**row, "settings": {"head": head}} for row in result_rows(model, "detection", INK, AP=value)]

    rows = [*with_head("large", "student", 0.6), *with_head("dense", "student", 0.5), *with_head("dense", "base", 0.4)]
    (line,) = table_lines(rows)
    assert {kind: cell.value for kind, cell in line.cells.items()} == {"student_probe": 0.5, "base_probe": 0.4}


def test_without_a_head_the_best_probe_on_a_teacher_is_in_its_cell() -> None:
    rows = [
        row
        for name, value in (("one", 0.6), ("two", 0.7))
        for row in result_rows(name, "classification", INK, knn_top1=0.99, linear_top1=value)
    ]
    (line,) = table_lines(rows)
    assert (line.cells["teacher"].value, line.cells["teacher"].note) == (0.7, "probe on two")
    assert line.retention is None and line.best is None


def test_each_data_set_task_and_head_has_its_own_line() -> None:
    rows = [
        *result_rows("student", "semantic", INK, mIoU=0.3),
        *result_rows("student", "semantic", Path("/a/camvid"), "one", mIoU=0.4),
        *result_rows("student", "semantic", Path("/a/camvid"), "two", mIoU=0.5),
        *result_rows("student", "classification", INK, top1=float("nan"), linear_top1=0.9),
    ]
    lines = [
        (line.task.name, line.data, line.head, [c.value for c in line.cells.values()]) for line in table_lines(rows)
    ]
    assert lines == [
        ("classification", "ink", None, [0.9]),
        ("semantic", "ink", None, [0.3]),
        ("semantic", "camvid", "one", [0.4]),
        ("semantic", "camvid", "two", [0.5]),
    ]
