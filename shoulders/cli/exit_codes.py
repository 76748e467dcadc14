"""Errors that are not bugs: the exit code of each, and one line for the user."""

from __future__ import annotations

import errno

from shoulders.errors import DataError, ShouldersError, SpaceError

WORKER_LOST = 70
SMALLER_STEP = "raise train.accumulate, or lower train.batch"
# a phrase in a RuntimeError of torch -> exit code, and what to change
TORCH_ERRORS = {
    "DataLoader worker": (WORKER_LOST, "a worker process died, perhaps out of memory: lower images.workers"),
    "out of memory": (SpaceError.exit_code, SMALLER_STEP),
    "can't allocate memory": (SpaceError.exit_code, SMALLER_STEP),
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_MESSAGE_CHARS = 300


def explain_error(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error; None for one that nobody foresaw, which is a bug."""
    if isinstance(error, ShouldersError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return SpaceError.exit_code, f"out of memory; {SMALLER_STEP} or images.workers"
    if isinstance(error, RuntimeError):
        return _explain_torch(str(error))
    if isinstance(error, OSError):
        return _explain_system(error)
    return None


def _explain_torch(message: str) -> tuple[int, str] | None:
    for phrase, (code, fix) in TORCH_ERRORS.items():
        if phrase in message:
            return code, f"{' '.join(message.split())[:MAX_MESSAGE_CHARS]}; {fix}"
    return None


def _explain_system(error: OSError) -> tuple[int, str]:
    path = error.filename or "the disk"
    if error.errno in DISK_FULL:
        return SpaceError.exit_code, f"{path}: no space left on the disk; free some space and start it again"
    return DataError.exit_code, f"{path}: {error.strerror or error}"
