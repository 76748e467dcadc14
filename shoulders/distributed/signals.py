"""Signals that end a run after a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put themselves into.

    Launchers send a signal more than once; only a second Ctrl-C, a second or more after the first, ends the process
    at once. Outside the main thread, where no signal arrives, the list stays empty.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    first: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        first.append(time.monotonic())
        if number == signal.SIGINT and first[-1] - first[0] > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
