"""Locks in the file system, which end with the process that holds them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.storage.atomic import write_bytes

RUN_LOCK = ".run"


class FileLocks:
    """Named locks by which processes, on one machine or several, share pieces of work without doing one twice.

    Args:
        folder: where the lock files are; created by the first claim.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Try to take a lock for the length of this context; yields False if another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{name}.lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):  # not found: another process has just removed the folder
            yield False
            return
        try:
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            write_bytes(self._owner_file(name), owner.encode(), durable=False)
            yield True
        finally:
            self._owner_file(name).unlink(missing_ok=True)
            # removed while it is locked: a process that has opened the file in the meantime sees that and retries
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def holder(self, name: str) -> str:
        """Process and machine that hold a lock."""
        try:
            return self._owner_file(name).read_text()
        except OSError:
            return "another process"

    def remove_stale(self) -> None:
        """Remove lock files of killed processes, and the folder if no lock is held."""
        for path in sorted(self.folder.glob("*.lock")):
            with self.claim(path.stem):
                pass
        with suppress(OSError):
            self.folder.rmdir()

    def _owner_file(self, name: str) -> Path:
        return self.folder / f"{name}.txt"


@contextmanager
def run_lock(out: Path, dist: DistContext) -> Iterator[None]:
    """Lock a run folder on all ranks, so that no second run writes into it.

    Raises:
        RecipeError: another process holds the lock.
    """
    locks = FileLocks(out)
    with locks.claim(RUN_LOCK) if dist.is_main else nullcontext(True) as is_ours:
        if dist.any(not is_ours):
            raise RecipeError(
                f"out: {out} is in use by {locks.holder(RUN_LOCK)}; wait for it, or stop it, or choose another out"
            )
        yield
