"""A signal at any time ends a run with the documented code, and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoulders import distillation
from shoulders.distillation import Trainer
from shoulders.distributed.signals import catch_signals
from shoulders.errors import Interrupted
from shoulders.storage.atomic import write_folder
from shoulders.training.checkpoint import checkpoints
from shoulders.training.heldout import HeldOutSet
from shoulders.training.step import TrainStep
from tests.crashes import before, fork
from tests.runs import SHORT, run, run_tree
from tests.tiny import run_cli, same_tensors, student_weights

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
NOTHING, CONTINUE, FINISHED = "start again with the same command", "continue with --resume", "is finished"
# when the signal arrives: (before which function, at which of its calls, signal, advice, checkpoints that exist then)
POINTS: dict[str, tuple[Any, str, int, int, str, list[int]]] = {
    "the images are opened": (distillation, "open_images", 1, TERM, NOTHING, []),
    "a teacher is loaded": (distillation, "load_teacher", 2, USR1, NOTHING, []),
    "the calibration": (Trainer, "calibrate", 1, INT, NOTHING, []),
    "the first evaluation": (HeldOutSet, "measure", 1, TERM, CONTINUE, [1]),
    "the first step": (TrainStep, "__call__", 1, INT, CONTINUE, [1]),
    "a step": (TrainStep, "__call__", 3, USR1, CONTINUE, [3]),
    "a save": (distillation, "save_checkpoint", 1, TERM, CONTINUE, [3]),
    "the last evaluation": (HeldOutSet, "measure", 2, INT, CONTINUE, [4]),
    "the last save": (distillation, "save_checkpoint", 2, USR1, CONTINUE, [4]),
    "the weights are gathered": (distillation, "gather_state", 3, TERM, FINISHED, [4]),
    "the student is written": (distillation, "save_student", 1, INT, FINISHED, [4]),
    "the results are written": (distillation, "write_results", 1, TERM, FINISHED, [4]),
}


def send_at(count: int, number: int) -> Callable[[str], None]:
    """Sends a signal to this process, twice as launchers do, at one of the calls of a function."""
    calls = [0]

    def on_call(name: str) -> None:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    return on_call


@pytest.mark.parametrize("point", POINTS)
def test_a_signal_at_any_time_ends_with_the_documented_code(
    point: str, tiny_world: Path, short_run: Path, tmp_path: Path
) -> None:
    owner, name, count, number, advice, steps = POINTS[point]
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run_tree(tiny_world, out, **SHORT)))

    def interrupted() -> None:
        before(owner, name, send_at(count, number))
        finished = run_cli("distill", recipe)
        (tmp_path / "log").write_text(finished.stderr)
        sys.exit(finished.returncode)

    assert fork(interrupted) == 128 + number
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith(f"shoulders: interrupted by signal {number}; ") and last.endswith(advice)
    assert [int(path.name.removeprefix("step-")) for path in checkpoints(out / "checkpoints")] == steps
    assert not list(out.rglob("*.partial"))
    assert (out / "student").exists() == (advice == FINISHED)
    run(tiny_world, out, resume=True, **SHORT)
    assert same_tensors(student_weights(out), student_weights(short_run))


def test_a_signal_that_arrives_in_the_last_moment_is_not_dropped() -> None:
    previous = signal.getsignal(USR1)
    with pytest.raises(Interrupted, match="interrupted by signal 10; all is kept") as stop:
        with catch_signals("all is kept") as signals:
            assert signals == []
            os.kill(os.getpid(), USR1)
    assert stop.value.exit_code == 138
    assert signal.getsignal(USR1) == previous
    with pytest.raises(ValueError, match="another"):  # another error wins
        with catch_signals("all is kept"):
            os.kill(os.getpid(), USR1)
            raise ValueError("another")


def test_another_thread_catches_no_signals() -> None:
    received: list[list[int]] = []

    def enter() -> None:
        with catch_signals() as signals:
            received.append(signals)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert received == [[]]


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_partial_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((0.0, 1.5))
    monkeypatch.setattr("shoulders.distributed.signals.time.monotonic", lambda: next(times))

    def write(folder: Path) -> None:
        (folder / "weights").touch()
        os.kill(os.getpid(), INT)
        os.kill(os.getpid(), INT)

    with pytest.raises(KeyboardInterrupt):
        with catch_signals():
            write_folder(tmp_path / "student", write)
    assert list(tmp_path.iterdir()) == []
