"""The command line ``shoulders``: one file per command, listed in `shoulders.cli.commands`."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from shoulders.cli.commands import app
from shoulders.errors import RankLost, explain_error, printable


def main(args: Sequence[str] | None = None) -> None:
    """Run a command, and turn errors into one line on stderr and an exit code.

    Args:
        args: command and its arguments; default: those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    is_main_rank = os.environ.get("RANK", "0") == "0"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be valid UTF-8
    warnings.formatwarning = lambda message, *details: f"shoulders: {printable(message)}\n"
    try:
        with nullcontext() if is_main_rank else redirect_stdout(None):  # under torchrun only the main rank prints
            app(args)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            print("shoulders: interrupted; start it again to continue: finished parts are kept", file=sys.stderr)
        raise
    except Exception as error:
        explained = explain_error(error)
        if explained is None:  # a bug: the traceback is needed
            raise
        code, message = explained
        lines = map(printable, message.split("\n"))  # some messages have a line for each fault
        print("shoulders:", "\n".join(lines), file=sys.stderr, flush=True)
        if isinstance(error, RankLost):
            os._exit(code)  # the interpreter would wait for the lost rank if a GPU does
        sys.exit(code)
