"""The numbers of the table: which row of a run belongs into which cell."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from shoulders.report.results import lines
from tests.report.conftest import rows_of

INK, OTHER = Path("/here/world/ink/instances"), Path("/there/world/ink/instances")


def evaluated() -> list[dict[str, Any]]:
    """What `evaluate` and `evaluate --heads` say of instance segmentation; AP is of boxes."""
    return [
        *rows_of("masker", "instance", INK, "masker", mask_AP=0.8, mask_AP_low=0.7, mask_AP_high=0.9, AP=0.99),
        *rows_of("student", "instance", INK, "masker", mask_AP=0.4, mask_AP_low=0.3, mask_AP_high=0.5, AP=0.98),
        *rows_of("student", "instance", OTHER, AP=0.97, mask_AP=0.5),
        *rows_of("base", "instance", OTHER, AP=0.96, mask_AP=0.3),
        *rows_of("scratch", "instance", OTHER, AP=0.95, mask_AP=0.2),
        *rows_of("student", "inheritance", INK, fvu_spread=1.4),
    ]


def test_a_line_holds_every_way_to_measure_a_task() -> None:
    (line,) = lines(evaluated())
    assert (line.task, line.data, line.head) == ("instance", "ink", "masker")
    values = {kind: cell.value for kind, cell in line.cells.items()}
    assert values == {"teacher": 0.8, "inherited": 0.4, "student_probe": 0.5, "base_probe": 0.3, "scratch": 0.2}
    assert (line.cells["teacher"].low, line.cells["teacher"].high) == (0.7, 0.9)
    assert line.retention == pytest.approx(0.5)
    assert line.best == "student_probe"  # the teacher itself does not count


def test_data_sets_whose_folders_have_one_name_are_not_mixed() -> None:
    rows = [
        *rows_of("student", "classification", Path("/data/cifar10/prepared"), linear_top1=0.9),
        *rows_of("base", "classification", Path("/data/cifar10/prepared"), linear_top1=0.8),
        *rows_of("student", "classification", Path("/data/cifar100/prepared"), linear_top1=0.5),
    ]
    told = {line.data: {kind: cell.value for kind, cell in line.cells.items()} for line in lines(rows)}
    assert told == {
        "cifar10/prepared": {"student_probe": 0.9, "base_probe": 0.8},
        "cifar100/prepared": {"student_probe": 0.5},
    }


def test_rows_of_benchmarks_say_the_same() -> None:
    (line,) = lines(evaluated())
    said = [
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
    (again,) = lines(said)
    assert again.cells == line.cells and again.data == line.data


def test_seeds_are_averaged_and_the_newest_measurement_of_each_counts() -> None:
    common = {"task": "detection", "kind": "inherited", "metric": "AP"}
    values = [0.4, 0.5, 0.9]
    rows = [{**common, "value": 0.1, "seed": 2}, *({**common, "value": v, "seed": s} for s, v in enumerate(values))]
    (line,) = lines(rows)
    cell = line.cells["inherited"]
    assert (cell.value, cell.seeds) == (pytest.approx(0.6), 3)
    assert cell.high is not None and cell.high - cell.value == pytest.approx(statistics.stdev(values))


def test_tuned_adapters_are_not_taken_for_probes() -> None:
    rows = rows_of("student", "semantic", INK, mIoU=0.3)
    tuned = [{**row, "value": 0.5, "settings": {"tune": "adapter"}} for row in rows]
    (line,) = lines(rows + tuned)
    assert {kind: cell.value for kind, cell in line.cells.items()} == {"student_probe": 0.3, "student_tuned": 0.5}


def test_student_and_base_are_compared_by_the_same_probe() -> None:
    def by(probe: str, model: str, value: float) -> list[dict[str, Any]]:
        return [{**row, "settings": {"head": probe}} for row in rows_of(model, "detection", INK, AP=value)]

    rows = [*by("large", "student", 0.6), *by("dense", "student", 0.5), *by("dense", "base", 0.4)]
    (line,) = lines(rows)
    assert {kind: cell.value for kind, cell in line.cells.items()} == {"student_probe": 0.5, "base_probe": 0.4}


def test_without_a_head_the_best_probe_on_a_teacher_stands_for_it() -> None:
    rows = [
        row
        for name, value in (("one", 0.6), ("two", 0.7))
        for row in rows_of(name, "classification", INK, knn_top1=0.99, linear_top1=value)
    ]
    (line,) = lines(rows)
    assert (line.cells["teacher"].value, line.cells["teacher"].note) == (0.7, "probe on two")
    assert line.retention is None and line.best is None


def test_other_data_other_tasks_and_other_heads_have_lines_of_their_own() -> None:
    rows = [
        *rows_of("student", "semantic", INK, mIoU=0.3),
        *rows_of("student", "semantic", Path("/here/camvid"), "one", mIoU=0.4),
        *rows_of("student", "semantic", Path("/here/camvid"), "two", mIoU=0.5),
        *rows_of("student", "classification", INK, top1=float("nan"), linear_top1=0.9),
    ]
    found = [(line.task, line.data, line.head, [c.value for c in line.cells.values()]) for line in lines(rows)]
    assert found == [
        ("classification", "ink", None, [0.9]),
        ("semantic", "ink", None, [0.3]),
        ("semantic", "camvid", "one", [0.4]),
        ("semantic", "camvid", "two", [0.5]),
    ]
