"""Locks on disk that fall with the process that holds them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError

RUN = ".run"


class FileLocks:
    """Pieces of work that several processes, on one machine or several, share without doing any of it twice.

    Args:
        folder: where the locks lie; made when something is claimed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def claim(self, work: str) -> Iterator[bool]:
        """Whether the work is ours, for as long as this context lasts; another process may hold it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{work}.lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):  # not found: another process has just tidied up
            yield False
            return
        try:
            self._whose(work).write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield True
        finally:
            self._whose(work).unlink(missing_ok=True)
            # while it is ours: whoever has opened it by now finds it gone, and tries again
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def holder(self, work: str) -> str:
        """Who holds the work."""
        try:
            return self._whose(work).read_text()
        except OSError:
            return "another process"

    def tidy(self) -> None:
        """Remove what killed processes left, and the folder unless someone is at work there."""
        for left in sorted(self.folder.glob("*.lock")):
            with self.claim(left.stem):
                pass
        with suppress(OSError):
            self.folder.rmdir()

    def _whose(self, work: str) -> Path:
        return self.folder / f"{work}.txt"


@contextmanager
def alone(out: Path, rank: DistContext) -> Iterator[None]:
    """Hold a run folder: of two runs that write into one, neither would be whole.

    Raises:
        RecipeError: another process holds it.
    """
    claims = FileLocks(out)
    with claims.claim(RUN) if rank.is_main else nullcontext(True) as ours:
        if rank.any(not ours):
            raise RecipeError(
                f"out: {out} is in use by {claims.holder(RUN)}; wait for it, or stop it, or choose another out"
            )
        yield
