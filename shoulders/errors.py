"""Errors for the user, each with its exit code, and text that is safe to print."""


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
