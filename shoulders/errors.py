"""The ways a run can be refused or stop, each with the exit code of the command line."""


class ShouldersError(Exception):
    """One line for the user: what was given, what is allowed, what to change."""

    exit_code: int = 1


class RecipeError(ShouldersError):
    """A recipe or an argument that cannot work; found before anything costly starts."""

    exit_code = 2


class DataError(ShouldersError):
    """Images, weights or a checkpoint that must not be used as they are."""

    exit_code = 3


class NumericError(ShouldersError):
    """Training left the finite numbers."""

    exit_code = 4


class SpaceError(ShouldersError):
    """No disk space or memory is left to go on."""

    exit_code = 5


class Interrupted(ShouldersError):
    """A signal asked the run to stop; its checkpoint, or what is made of a cache, is saved."""

    def __init__(self, number: int, step: int | None = None):
        self.number, self.exit_code = number, 128 + number
        saved = f" at step {step}; the checkpoint is saved: go on with --resume"
        made = "; what is made is kept: go on with the same command"
        super().__init__(f"stopped by signal {number}" + (made if step is None else saved))
