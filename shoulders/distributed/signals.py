"""Signals that end a run after a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is what clusters send some time before the limit; Windows has none
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 in a list instead of ending the process.

    Launchers send a signal more than once, so only a second Ctrl-C, one second or more after the first signal, ends the
    process at once. Outside the main thread, which alone receives signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    times: list[float] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        times.append(time.monotonic())
        if number == signal.SIGINT and times[-1] - times[0] > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
