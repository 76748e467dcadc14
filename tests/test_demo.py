"""The demo in a minute: everything that it leaves, and that it goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoulders.demo import FULL, KINDS, METRICS, QUICK, TRIES, Row, demo, recipe
from shoulders.tasks import TASKS
from shoulders.training.checkpoint import checkpoints
from shoulders.training.supervised_baseline import BATCH, equal_flops
from shoulders.world import TEACHER_TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return demo(folder, quick=True)


def test_every_task_is_measured_in_every_way(rows: list[Row], folder: Path) -> None:
    assert [(row["task"], row["kind"]) for row in rows] == [(task, kind) for task in METRICS for kind in KINDS]
    assert all(0 <= row["value"] <= 1 for row in rows)
    teachers = {row["task"]: row["value"] for row in rows if row["kind"] == "teacher"}
    assert all(teachers[task] > least for task, least in zip(METRICS, (0.9, 0.7, 0.6, 0.5), strict=True))
    assert "</html>" in (folder / "report.html").read_text()


def test_what_is_there_is_not_run_again(rows: list[Row], folder: Path) -> None:
    for row in (folder / "measured").glob("inherited-*.json"):
        row.unlink()
    trained = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    assert demo(folder, quick=True) == rows
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == trained


def test_killed_in_the_middle_it_goes_on_to_the_same_rows(rows: list[Row], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "scenes", tmp_path / "run" / "scenes")
    command = [sys.executable, "-m", "shoulders", "demo", "--quick", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        deadline = time.monotonic() + 120
        while len(checkpoints(tmp_path / "run" / "checkpoints")) < 2 and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
    assert not (tmp_path / "run" / "student").exists()
    assert demo(tmp_path / "run", quick=True) == rows
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(QUICK.steps + 1))


def test_four_trainings_from_scratch_cost_what_the_one_distillation_did(rows: list[Row], folder: Path) -> None:
    """The recorded steps against the FLOPs counted on the quick student, which is the full one's shape."""
    assert len(TRIES) == 1
    images = FULL.steps * FULL.batch / (QUICK.steps * QUICK.batch)
    for task, style, labels in TEACHER_TASKS.values():
        goal = TASKS[task].tune(TASKS[task].find(folder / "scenes" / style / labels, "image"))
        equal = equal_flops(folder, goal, (96, 96)).distillation * images / 4
        supervised = equal_flops(folder, goal, (96, 96)).supervised
        assert FULL.scratch[task] == pytest.approx(equal / supervised / BATCH, rel=0.05)


def test_full_and_quick_differ_in_length_alone(tmp_path: Path) -> None:
    full, quick = (recipe(tmp_path, effort).model_dump() for effort in (FULL, QUICK))
    assert {key for key in full if full[key] != quick[key]} == {"images", "transfer", "train"}
