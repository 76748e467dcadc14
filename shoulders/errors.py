"""Errors for the user, each with its exit code, and text that is safe to print."""

from __future__ import annotations

import errno

SMALLER_STEP = "raise train.accumulate, or lower train.batch"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_MESSAGE_CHARS = 300


def printable(text: object) -> str:
    """Text in one line, with control characters escaped: names of files and classes may hold any character."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


PARTS_ARE_KEPT = "finished parts are kept: continue with the same command"


class ShouldersError(Exception):
    """One line for the user: what is wrong, what is allowed, what to change."""

    exit_code: int = 1


class RecipeError(ShouldersError):
    """A recipe or an argument that cannot work; raised before anything costly starts."""

    exit_code = 2


class DataError(ShouldersError):
    """Images, weights or a checkpoint that cannot be used as they are."""

    exit_code = 3


class NumericError(ShouldersError):
    """A loss or a feature is not finite."""

    exit_code = 4


class SpaceError(ShouldersError):
    """The disk or the memory is full."""

    exit_code = 5


class Interrupted(ShouldersError):
    """SIGTERM, SIGINT or SIGUSR1 ended the run, after its checkpoint or the finished part of its cache was saved.

    Args:
        number: of the signal; the exit code is 128 + number.
        advice: what is kept, and how to continue.
    """

    def __init__(self, number: int, advice: str = PARTS_ARE_KEPT):
        self.number, self.exit_code = number, 128 + number
        super().__init__(f"interrupted by signal {number}; {advice}")


class ProcessLost(ShouldersError):
    """A worker process or another rank died, was stopped, or does not take part any more.

    Args:
        message: which one, and why if it is known.
        exit_code: that of the error which ended it, if it is known.
    """

    exit_code = 70

    def __init__(self, message: str, exit_code: int = exit_code):
        self.exit_code = exit_code
        super().__init__(message)


class RankLost(ProcessLost):
    """Another rank is lost."""


# a phrase in a RuntimeError of torch -> exit code, and what to change
TORCH_ERRORS = {
    "DataLoader worker": (
        ProcessLost.exit_code,
        "a worker process died, perhaps out of memory: lower images.workers",
    ),
    "out of memory": (SpaceError.exit_code, SMALLER_STEP),
    "can't allocate memory": (SpaceError.exit_code, SMALLER_STEP),
}


def explain_error(error: BaseException) -> tuple[int, str] | None:
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
