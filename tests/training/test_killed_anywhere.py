"""A run that is killed before any call that changes the disk, again and again, ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders import distillation
from shoulders.config.recipe import check_recipe
from shoulders.distillation import prepare
from shoulders.distributed.context import DistContext
from shoulders.features import Batch
from shoulders.images import image_set
from shoulders.training.checkpoint import load_newest
from shoulders.training.heldout import HeldOutSet
from shoulders.training.optimizers import Optimizers
from shoulders.training.step import StepOutput, TrainStep
from tests.crashes import before, fork, kill_at, watch_disk
from tests.runs import SHORT, STEPS, run, run_tree
from tests.tiny import metric_rows, same_tensors, student_weights

SINGLE_PROCESS = DistContext(0, 1, torch.device("cpu"))


def names(run: Path) -> set[str]:
    """All files of a run; without its first checkpoint, which remains if the kill was just before its removal."""
    paths = (str(path.relative_to(run)) for path in run.rglob("*"))
    return {path for path in paths if not path.startswith("checkpoints/step-00000002")}


def check_same(out: Path, expected: Path) -> None:
    """Weights, log and files of a run are those of a run that nothing interrupted."""
    assert same_tensors(student_weights(out), student_weights(expected))
    for kind, number in (("train", "loss"), ("evaluation", "fvu_spread")):
        one, other = ([(row["step"], row[number]) for row in metric_rows(folder, kind)] for folder in (out, expected))
        assert one == other
    assert names(out) == names(expected)


def newest_step(out: Path) -> int:
    """The step of the latest valid checkpoint; 0 where there is none."""
    checkpoint = load_newest(out / "checkpoints", print)
    return int(checkpoint[1]["step"]) if checkpoint else 0


def kill_and_resume(world: Path, expected: Path, root: Path, numbers: Iterable[int], start: Path | None) -> int:
    """Kill a run before each of some calls that change the disk, and resume it; returns how many kills there were.

    Args:
        numbers: of the calls, rising; those after the last call of the run end the test.
        start: the folder of a killed run that is resumed; None: a new run is killed.
    """
    out, step, kills = root / "run", newest_step(start) if start else 0, 0
    for number in numbers:
        shutil.rmtree(out, ignore_errors=True)
        if start:
            shutil.copytree(start, out)
        status = fork(partial(run_until, number, world, out, resume=start is not None))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert newest_step(out) >= step, number  # once there is a checkpoint, there always is one
        step = newest_step(out)
        assert last_trained(out) - step <= SHORT["train__save_every"]
        run(world, out, resume=True, **SHORT)
        check_same(out, expected)
    return kills


def run_until(number: int, world: Path, out: Path, resume: bool) -> None:
    """A run that is killed before a call that changes the disk."""
    watch_disk(kill_at(number))
    run(world, out, resume=resume, **SHORT)


def last_trained(out: Path) -> int:
    """The last step in the log of a run."""
    rows = metric_rows(out) if (out / "metrics.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


@pytest.fixture(scope="module")
def killed_in_a_save(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its second save: a checkpoint, and half of another one."""
    out = tmp_path_factory.mktemp("killed") / "run"

    def work() -> None:
        seen = count(1)

        def on_call(name: str) -> None:
            if name == "half of a file" and next(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        watch_disk(on_call)
        run(tiny_world, out, resume=False, **SHORT)

    assert fork(work) == -signal.SIGKILL
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004.partial"]
    return out


STRIDES = [
    16,
    pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]  # every call: 106 of a run, 86 of a resumed one


def call_numbers(stride: int) -> range:
    """Numbers of calls, more than a run makes."""
    return range(max(1, stride // 2), 1000, stride)


@pytest.mark.parametrize("stride", STRIDES)
def test_a_run_killed_before_any_call_that_changes_the_disk_ends_with_the_same_bits(
    stride: int, tiny_world: Path, short_run: Path, tmp_path: Path
) -> None:
    assert kill_and_resume(tiny_world, short_run, tmp_path, call_numbers(stride), None) >= 100 // stride


@pytest.mark.parametrize("stride", STRIDES)
def test_a_resumed_run_killed_before_any_call_that_changes_the_disk_ends_with_the_same_bits(
    stride: int, tiny_world: Path, short_run: Path, killed_in_a_save: Path, tmp_path: Path
) -> None:
    assert kill_and_resume(tiny_world, short_run, tmp_path, call_numbers(stride), killed_in_a_save) >= 80 // stride


# where a process is killed: before which function, at which of its calls; every other one gets a step further
EVENTS: list[tuple[Any, str, int]] = [
    (TrainStep, "__call__", 2),
    (distillation, "save_checkpoint", 1),
    (torch.Tensor, "backward", 2),
    (Optimizers, "step", 1),
]


def log_images(path: Path) -> None:
    """Append the images of each step to a file, for the rest of this (child) process."""
    original = TrainStep.__call__

    def call(self: TrainStep, number: int, batch: Batch) -> StepOutput:
        with path.open("a") as file:
            file.write(json.dumps([number, batch.ids.tolist()]) + "\n")
        return original(self, number, batch)

    setattr(TrainStep, "__call__", call)  # noqa: B010


def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bits(
    tiny_world: Path, uninterrupted_run: Path, tmp_path: Path
) -> None:
    out, changes = tmp_path / "run", {"train__save_every": 1, "train__keep_checkpoints": 1}

    def resume() -> None:
        log_images(tmp_path / "images")
        run(tiny_world, out, resume=True, **changes)

    def killed(owner: Any, name: str, number: int) -> None:
        before(owner, name, kill_at(number))
        resume()

    for kill in range(20):  # 12 of them in the first epoch, which has 6 steps
        assert fork(partial(killed, *EVENTS[kill % len(EVENTS)])) == -signal.SIGKILL, kill
    assert newest_step(out) == 10
    assert fork(resume) == 0
    assert same_tensors(student_weights(out), student_weights(uninterrupted_run))
    trainer = prepare(check_recipe(run_tree(tiny_world, tmp_path / "other")), {}, SINGLE_PROCESS)
    expected = {n: batch.ids.tolist() for n, batch in enumerate(trainer.batches.training(0, STEPS), 1)}
    steps = [json.loads(line) for line in (tmp_path / "images").read_text().splitlines()]
    assert all(ids == expected[number] for number, ids in steps)
    assert {number for number, _ in steps} == expected.keys()


@pytest.mark.parametrize(("owner", "name", "number"), [(image_set, "decode_with_size", 30), (HeldOutSet, "measure", 2)])
def test_a_run_killed_while_it_reads_images_or_evaluates_ends_with_the_same_bits(
    owner: Any, name: str, number: int, tiny_world: Path, uninterrupted_run: Path, tmp_path: Path
) -> None:
    def killed() -> None:
        before(owner, name, kill_at(number))
        run(tiny_world, tmp_path / "run")

    assert fork(killed) == -signal.SIGKILL
    run(tiny_world, tmp_path / "run", resume=True)
    check_same(tmp_path / "run", uninterrupted_run)
