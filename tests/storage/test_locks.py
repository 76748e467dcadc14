"""A lock has one holder, and ends with its process."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.storage.locks import RUN_LOCK, FileLocks, run_lock

SINGLE_PROCESS = DistContext(0, 1, torch.device("cpu"))


def hold_in_child(folder: Path, name: str) -> int:
    """A child process that holds a lock until it is killed; returns its id once it has the lock."""
    child = os.fork()
    if child == 0:
        with FileLocks(folder).claim(name) as is_ours:
            (folder / "ready").write_text(str(is_ours))
            time.sleep(60)
        os._exit(0)
    while not (folder / "ready").exists() or not (folder / "ready").read_text():
        time.sleep(0.01)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    locks, others = FileLocks(tmp_path / "locks"), FileLocks(tmp_path / "locks")
    with locks.claim("one") as is_ours, others.claim("one") as is_theirs, others.claim("two") as is_free:
        assert (is_ours, is_theirs, is_free) == (True, False, True)
        assert others.holder("one") == f"process {os.getpid()} on {socket.gethostname()}"
    with others.claim("one") as is_ours:
        assert is_ours
    assert others.holder("one") == "another process"
    assert list((tmp_path / "locks").iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    child = hold_in_child(tmp_path, "one")
    locks = FileLocks(tmp_path)
    try:
        with locks.claim("one") as is_ours:
            assert not is_ours
        assert locks.holder("one") == f"process {child} on {socket.gethostname()}"
    finally:
        kill(child)
    with locks.claim("one") as is_ours:
        assert is_ours


def test_stale_locks_are_removed_and_held_ones_are_not(tmp_path: Path) -> None:
    kill(hold_in_child(tmp_path, "stale"))
    (tmp_path / "ready").unlink()
    locks = FileLocks(tmp_path)
    with FileLocks(tmp_path).claim("held"):
        locks.remove_stale()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["held.lock", "held.txt"]
    locks.remove_stale()
    assert not tmp_path.exists()


def test_a_run_folder_is_locked_for_one_run(tmp_path: Path) -> None:
    with run_lock(tmp_path, SINGLE_PROCESS):
        with pytest.raises(RecipeError, match=f"out: .* is in use by process {os.getpid()} on .*; wait for it"):
            with run_lock(tmp_path, SINGLE_PROCESS):
                pytest.fail("two runs in one folder")
        assert (tmp_path / f"{RUN_LOCK}.lock").exists()
    with run_lock(tmp_path, SINGLE_PROCESS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_refuse_a_locked_run_folder(tmp_path: Path) -> None:
    class OtherRank(DistContext):
        """Rank 1, while rank 0 failed to take the lock."""

        def any(self, flag: bool) -> bool:
            return True

    with pytest.raises(RecipeError, match="is in use by another process"):
        with run_lock(tmp_path, OtherRank(1, 2, torch.device("cpu"))):
            pytest.fail("a rank continued without the lock")
