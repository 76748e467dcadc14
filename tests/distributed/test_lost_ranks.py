"""A rank that is killed, stopped or fails ends the others soon, with one line; ranks that differ are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import distributed

from shoulders.distributed.peers import Peers
from shoulders.errors import DataError, RankLost
from tests.distributed.ranks import ROOT, TIMEOUT_S, Ended, run_ranks, run_torchrun
from tests.runs import run_tree
from tests.tiny import metric_rows, save_convnext, save_tiny_world

MAX_S = 5 * (TIMEOUT_S + 40)  # five times what is promised: the machine may be busy
TRAIN = {"steps": 8, "save_every": 4, "evaluate_every": 4}


def peers_of(world_size: int, seconds: float = 60) -> list[Peers]:
    store = distributed.HashStore()
    return [Peers(store, rank, world_size, timedelta(seconds=seconds)) for rank in range(world_size)]


@contextmanager
def in_threads(*functions: Callable[[], Any]) -> Iterator[None]:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


def test_a_barrier_waits_for_every_rank() -> None:
    passed: list[int] = []

    def work(peers: Peers, delay: float) -> None:
        with peers:
            for number in range(3):
                time.sleep(delay)
                passed.append(number)
                peers.barrier()

    one, slow, other = peers_of(3)
    with in_threads(lambda: work(one, 0), lambda: work(slow, 0.1), lambda: work(other, 0)):
        pass
    assert passed == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_error_of_one_rank_is_that_of_all() -> None:
    one, other = peers_of(2)
    errors: list[BaseException] = []

    def fails() -> None:
        with pytest.raises(DataError), other:
            raise DataError("a/shard: damaged")

    def waits() -> None:
        with pytest.raises(RankLost) as lost, one:
            one.barrier()
        errors.append(lost.value)

    with in_threads(fails, waits):
        pass
    assert isinstance(errors[0], RankLost)
    assert (str(errors[0]), errors[0].exit_code) == ("rank 1 ended: a/shard: damaged", 3)


def test_a_rank_without_a_sign_of_life_is_named() -> None:
    one, other, _ = peers_of(3, seconds=0.5)
    errors: list[BaseException] = []

    def waits(peers: Peers) -> None:
        with pytest.raises(RankLost) as lost, peers:
            peers.barrier()
        errors.append(lost.value)

    with in_threads(lambda: waits(one), lambda: waits(other)):
        pass
    assert {str(error) for error in errors} == {
        "rank 2 of 3 is lost: killed or stopped, or its machine does not answer"
    }


def write_recipe(world: Path, folder: Path, name: str = "recipe", **changes: Any) -> Path:
    train = {f"train__{key}": value for key, value in TRAIN.items()}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run_tree(world, folder / "run", **train | changes)))
    return path


def fail(world: Path, folder: Path, rank: int, event: str, count: int, kind: str, **changes: Any) -> list[Ended]:
    recipe = write_recipe(world, folder, **changes)
    return run_ranks(folder, [recipe] * 2, rank=rank, event=event, count=count, kind=kind)


def assert_one_line(ended: Ended, message: str, code: int = 70) -> None:
    errors = [line for line in ended.stderr if line.startswith("shoulders: ")]
    assert len(errors) == 1 and message in errors[0], ended.stderr
    assert not [line for line in ended.stderr if "Traceback" in line or "gloo" in line], ended.stderr
    assert ended.code == code and ended.seconds < MAX_S


def test_a_killed_rank_ends_the_other_with_one_line(tiny_world: Path, tmp_path: Path) -> None:
    survivor, killed = fail(tiny_world, tmp_path, 1, "step", 6, "kill")
    assert killed.code == -9
    assert_one_line(survivor, "rank 1 of 2 is lost: killed or stopped")
    assert "resume from step-00000004 with --resume" in survivor.stderr[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "event", "count"),
    [
        (1, "meet", 1),
        (1, "groups", 1),
        (1, "load", 1),
        (1, "step", 3),
        (1, "gather", 4),
        (1, "save", 1),
        (1, "evaluate", 2),
        (0, "step", 3),
        (0, "write", 1),
        (0, "evaluate", 2),
    ],
)
def test_a_stopped_rank_ends_the_other_wherever_it_stops(
    rank: int, event: str, count: int, tiny_world: Path, tmp_path: Path
) -> None:
    ended = fail(tiny_world, tmp_path, rank, event, count, "stop")
    assert ended[rank].code is None
    assert_one_line(ended[1 - rank], f"rank {rank} of 2 is lost: killed or stopped")


@pytest.mark.slow
@pytest.mark.parametrize("event", ["meet", "groups"])
def test_a_main_rank_that_stops_at_the_start_ends_the_other(event: str, tiny_world: Path, tmp_path: Path) -> None:
    """The store in which the ranks meet is in the main rank's process, and does not answer any more."""
    _, survivor = fail(tiny_world, tmp_path, 0, event, 1, "stop")
    assert_one_line(survivor, "another rank, or what started it, is stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("loop", "rank 1 of 2 is lost: it runs, but did not take part for 5 s"),
        ("exit", "rank 1 ended: SystemExit: 0"),
        ("bug", "rank 1 ended: ArithmeticError: a bug of one rank"),
    ],
)
def test_a_rank_that_leaves_a_step_is_named(kind: str, message: str, tiny_world: Path, tmp_path: Path) -> None:
    survivor, _ = fail(tiny_world, tmp_path, 1, "step", 3, kind)
    assert_one_line(survivor, message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "event", "kind", "message", "code"),
    [
        (0, "write", "disk", "step-00000004: no space left on the disk", 5),
        (1, "load", "data", "a/shard: damaged", 3),
        (1, "step", "nan", "not finite on one rank", 4),
        (0, "evaluate", "data", "a/shard: damaged", 3),
    ],
)
def test_an_error_on_one_rank_ends_both_with_the_same_reason(
    rank: int, event: str, kind: str, message: str, code: int, tiny_world: Path, tmp_path: Path
) -> None:
    ended = fail(tiny_world, tmp_path, rank, event, 1, kind)
    assert_one_line(ended[rank], message, code)
    assert_one_line(ended[1 - rank], message, code)
    assert f"rank {rank} ended: " in ended[1 - rank].stderr[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_torchrun_ends_with_one_line_of_the_rank_that_is_left(kind: str, tiny_world: Path, tmp_path: Path) -> None:
    code, survivor = run_torchrun(
        tmp_path, write_recipe(tiny_world, tmp_path), rank=1, event="step", count=6, kind=kind
    )
    assert code == 1  # that of torchrun itself
    errors = [line for line in survivor if line.startswith("shoulders: ")]
    assert len(errors) == 1 and "rank 1 of 2 is lost" in errors[0] and "resume from step-00000004" in errors[0], (
        survivor
    )
    assert not [line for line in survivor if "Traceback" in line or "gloo" in line], survivor


@pytest.mark.slow
def test_a_missing_teacher_on_one_rank_ends_both(tiny_world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tiny_world, tmp_path)
    other = write_recipe(tiny_world, tmp_path, "other", teachers__classifier__model=str(tmp_path / "absent"))
    for ended in run_ranks(tmp_path, [recipe, other]):
        assert_one_line(ended, "teachers.classifier.model: differs between ranks 0 and 1", 2)


@pytest.mark.slow
def test_a_long_write_of_the_main_rank_ends_no_run(tiny_world: Path, tmp_path: Path) -> None:
    assert [ended.code for ended in fail(tiny_world, tmp_path, 0, "write", 1, "slow")] == [0, 0]
    assert len(metric_rows(tmp_path / "run")) == TRAIN["steps"]


@pytest.mark.slow
def test_a_run_that_lost_a_rank_resumes_with_the_same_losses(tiny_world: Path, tmp_path: Path) -> None:
    for name in ("lost", "whole"):
        (tmp_path / name).mkdir()
    fail(tiny_world, tmp_path / "lost", 1, "step", 6, "kill")
    recipe = tmp_path / "lost" / "recipe.yaml"
    assert [ended.code for ended in run_ranks(tmp_path / "lost", [recipe] * 2, "--resume")] == [0, 0]
    whole = write_recipe(tiny_world, tmp_path / "whole")
    assert [ended.code for ended in run_ranks(tmp_path / "whole", [whole] * 2)] == [0, 0]
    lost, expected = (json.dumps([row["loss"] for row in metric_rows(tmp_path / n / "run")]) for n in ("lost", "whole"))
    assert lost == expected


def test_ranks_with_different_recipes_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    recipes = [write_recipe(tiny_world, tmp_path), write_recipe(tiny_world, tmp_path, "other", train__lr=0.01)]
    for ended in run_ranks(tmp_path, recipes):
        assert_one_line(ended, "train.lr: differs between ranks 0 and 1 (0.005 and 0.01); start every rank with", 2)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def other_images(folder: Path) -> None:
    (folder / "images" / "0059.jpg").rename(folder / "images" / "0060.jpg")


def other_weights(folder: Path) -> None:
    save_convnext(folder / "classifier", seed=9)


def other_base(folder: Path) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    name = max(weights)
    save_file(weights | {name: weights[name] + 1e-6}, folder / "base" / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "key"),
    [(other_images, "images"), (other_weights, "teachers.classifier"), (other_base, "student.base")],
)
def test_ranks_with_other_files_at_the_same_paths_are_refused(
    change: Callable[[Path], None], key: str, tmp_path: Path
) -> None:
    for rank in ("0", "1"):
        save_tiny_world(tmp_path / rank / "world")
    change(tmp_path / "1" / "world")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run_tree(Path("world"), Path("run"))))
    for ended in run_ranks(tmp_path, [recipe] * 2):
        assert_one_line(ended, f"{key}: differs between ranks 0 and 1; give every rank the same files", 2)


TWICE = """
from shoulders.distributed.context import init_distributed
for number in range(3):
    with init_distributed() as dist:
        dist.barrier()
        assert dist.gather((dist.rank, number)) == [(0, number), (1, number)]
"""


@pytest.mark.slow
def test_a_program_may_join_more_than_once(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TWICE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py")], env=env, capture_output=True, text=True, timeout=MAX_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
