"""Signals that end a run after its checkpoint or the finished part of its work was saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from shoulders.distributed.context import DistContext
from shoulders.errors import PARTS_ARE_KEPT, Interrupted

# SIGUSR1 is what clusters send some time before the limit; Windows has none
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def catch_signals(advice: str = PARTS_ARE_KEPT) -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 in a list instead of ending the process.

    Launchers send a signal more than once, so only a second Ctrl-C, one second or more after the first signal, ends the
    process at once. Outside the main thread, which alone receives signals, the list stays empty.

    Args:
        advice: of the error that ends this context if a signal was received in it and nothing else ended it.

    Raises:
        Interrupted: at the end of the context.
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
    if received:
        raise Interrupted(received[0], advice)


def stop_if_signalled(signals: Sequence[int], dist: DistContext, advice: str) -> None:
    """End the run on all ranks if one of them has received a signal.

    Raises:
        Interrupted: with this advice.
    """
    if dist.any(bool(signals)):
        raise Interrupted(signals[0] if signals else signal.SIGTERM, advice)
