"""Rows of the same measurement are replaced, others stay."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from shoulders.errors import DataError
from shoulders.storage.results import read_rows, upsert_results


def row(value: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "student",
        "task": "semantic",
        "data": "camvid",
        "metric": "mIoU",
        "seed": 0,
        "value": value,
    } | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "base"},
        {"task": "instance"},
        {"data": "other"},
        {"metric": "IoU/road"},
        {"seed": 1},
        {"head": "segmenter"},
        {"settings": {"finetune": "adapter"}},
        {"settings": {"head": "upernet"}},
    ],
)
def test_a_row_replaces_that_of_the_same_measurement_only(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    upsert_results(path, [row(0.1), row(0.2, **changes)])
    upsert_results(path, [row(0.3)])
    assert read_rows(path) == [row(0.2, **changes), row(0.3)]
    upsert_results(path, [row(0.4, settings={"lr": 0.1})])  # other settings do not make another measurement
    assert read_rows(path) == [row(0.2, **changes), row(0.4, settings={"lr": 0.1})]


def add(path: Path, seed: int) -> None:
    upsert_results(path, [row(0.1, seed=seed)])


def test_processes_that_write_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=add, args=(path, seed)) for seed in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted(row["seed"] for row in read_rows(path)) == list(range(8))


def test_a_missing_file_has_no_rows_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "results.json") == []
    (tmp_path / "results.json").write_text('[{"model"')
    with pytest.raises(DataError, match=r"results\.json: damaged .*; move it out of the way, and measure again"):
        read_rows(tmp_path / "results.json")
