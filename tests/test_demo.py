"""The quick demo: its rows and files, and that it continues where it stopped."""

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

from shoulders.demo import BASELINE_CANDIDATES, FULL, KINDS, QUICK, Row, demo, demo_recipe
from shoulders.tasks import TASKS
from shoulders.training.checkpoint import checkpoints
from shoulders.training.supervised_baseline import BATCH, training_flops
from shoulders.world import TEACHER_TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return demo(folder, quick=True)


def test_every_task_is_measured_in_every_way(rows: list[Row], folder: Path) -> None:
    jobs = TEACHER_TASKS.values()
    assert [(row["task"], row["kind"]) for row in rows] == [(job.task, kind) for job in jobs for kind in KINDS]
    assert [row["metric"] for row in rows] == [TASKS[job.task].metric.in_heads for job in jobs for _ in KINDS]
    assert all(0 <= row["value"] <= 1 for row in rows)
    of_teachers = [row["value"] for row in rows if row["kind"] == "teacher"]
    assert all(value > least for value, least in zip(of_teachers, (0.9, 0.7, 0.6, 0.5), strict=True))
    assert "</html>" in (folder / "report.html").read_text()


def test_finished_parts_are_not_run_again(rows: list[Row], folder: Path) -> None:
    for file in (folder / "measured").glob("teacher_head-*.json"):
        file.unlink()
    trained = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    assert demo(folder, quick=True) == rows
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == trained


def test_a_killed_demo_continues_to_the_same_rows(rows: list[Row], folder: Path, tmp_path: Path) -> None:
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


def test_the_trainings_from_scratch_together_cost_the_flops_of_the_distillation(rows: list[Row], folder: Path) -> None:
    """The steps of the full demo, by the FLOPs counted on the quick student, which has the same architecture."""
    assert len(BASELINE_CANDIDATES) == 1
    images = FULL.steps * FULL.batch / (QUICK.steps * QUICK.batch)
    for teacher, (name, style, labels) in TEACHER_TASKS.items():
        splits = TASKS[name].find_splits(folder / "scenes" / style / labels, "image")
        flops = training_flops(folder, TASKS[name].finetune(splits), (96, 96))
        budget = flops.distillation * images / len(TEACHER_TASKS)
        assert FULL.baseline_steps[teacher] == pytest.approx(budget / flops.supervised / BATCH, rel=0.05)


def test_full_and_quick_differ_only_in_length(tmp_path: Path) -> None:
    full, quick = (demo_recipe(tmp_path, settings).model_dump() for settings in (FULL, QUICK))
    assert {key for key in full if full[key] != quick[key]} == {"images", "transfer", "train"}
