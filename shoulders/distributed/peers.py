"""What a rank knows of the others: that they live, which barrier they have reached, and why they ended.

A thread of every rank writes signs of life into the store in which the ranks met. So a rank that writes a large file
differs from one that is stopped: the others wait for the first, and end without the second.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch import distributed

from shoulders.errors import ProcessLost, RankLost, explain_error

INTERVAL_S = 1.0  # between two signs of life
POLL_S = 0.02  # between two looks at the other ranks, while this one waits for them
SILENT_INTERVALS = 3  # a rank without a sign for this long does not run
MAX_INTERVALS = 10  # to find out which rank is lost
MAX_WAIT_S = 7200.0  # at a barrier, also for a rank that shows signs of life


@dataclass
class Sign:
    """What a rank publishes.

    Args:
        beat: grows while the process runs.
        barrier: number of barriers reached; on rank 0, which waits for the others: passed.
        exit_code: set when the rank has left the run.
        reason: why it left; empty if it is done, or if the reason is another rank.
    """

    beat: int = 0
    barrier: int = 0
    exit_code: int | None = None
    reason: str = ""


class Peers:
    """The other ranks of a run. Within its context, a thread publishes the signs of this rank.

    Args:
        store: the store in which the ranks met; used by the thread alone.
        rank: of this process.
        world_size: number of ranks.
        timeout: a rank without a sign for this long is lost.
    """

    def __init__(self, store: distributed.Store, rank: int, world_size: int, timeout: timedelta) -> None:
        self.store, self.rank, self.world_size, self.timeout_s = store, rank, world_size, timeout.total_seconds()
        self.interval_s = min(INTERVAL_S, self.timeout_s / MAX_INTERVALS)
        self.mine = Sign()
        self.signs = {other: Sign() for other in range(world_size) if other != rank}
        self.changed_at = dict.fromkeys(self.signs, time.monotonic())
        self.watched: list[int] = []  # the ranks that this one waits for
        self.closing = False
        self.woken = threading.Event()
        self.thread = threading.Thread(target=self._exchange_signs, name="signs of life", daemon=True)

    def __enter__(self) -> Peers:
        self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(*_explain_end(error))
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._watch_ends()  # the store ends with this process, and the others still read in it
        self.closing = True
        self.woken.set()
        self.thread.join(self.interval_s)

    def barrier(self) -> None:
        """Wait until all ranks get here, for as long as they show signs of life: one of them may write a large file.

        Raises:
            RankLost: a rank has ended, or has shown no sign for the timeout, or the barrier takes `MAX_WAIT_S`.
        """
        number = self.mine.barrier + 1
        if self.rank == 0:
            self._wait_for(self.signs, number)
        self.mine.barrier = number
        self.woken.set()
        if self.rank != 0:
            self._wait_for([0], number)

    def lost(self) -> RankLost:
        """The error of a failed exchange: names the rank that caused it, and its own error if it had one."""
        self._leave(RankLost.exit_code, "")
        with _ignore_sigterm():  # torchrun sends it when a rank has died, and the reason would not be printed
            self._watch_ends()
        for rank, sign in self.signs.items():
            if sign.reason:
                return RankLost(f"rank {rank} ended: {sign.reason}", sign.exit_code or RankLost.exit_code)
        running = [rank for rank, sign in self.signs.items() if sign.exit_code is None]
        if silent := [rank for rank in running if rank in self._silent(self.interval_s * SILENT_INTERVALS)]:
            return RankLost(f"{self._name(silent)} lost: killed or stopped, or its machine does not answer")
        if running:
            return RankLost(f"{self._name(running)} lost: it runs, but did not take part for {self.timeout_s:g} s")
        return RankLost("the exchange with another rank failed, and all ranks have ended")

    def _wait_for(self, ranks: Iterable[int], number: int) -> None:
        with self._watch(ranks) as started_at:
            while behind := [rank for rank in ranks if self.signs[rank].barrier < number]:
                has_ended = any(self.signs[rank].exit_code is not None for rank in behind)
                waited = time.monotonic() - started_at
                if has_ended or waited > MAX_WAIT_S or self._silent(self.timeout_s).intersection(behind):
                    raise self.lost()
                time.sleep(POLL_S)

    def _watch_ends(self) -> None:
        """Wait until a reason is known, or every other rank has left or is silent; at most `MAX_INTERVALS`."""
        with self._watch(self.signs) as started_at:
            while time.monotonic() - started_at < self.interval_s * MAX_INTERVALS:
                silent = self._silent(self.interval_s * SILENT_INTERVALS)
                if all(sign.exit_code is not None or rank in silent for rank, sign in self.signs.items()):
                    break
                if not self.mine.reason and any(sign.reason for sign in self.signs.values()):
                    break
                time.sleep(POLL_S)

    @contextmanager
    def _watch(self, ranks: Iterable[int]) -> Iterator[float]:
        """Read the signs of other ranks within this context; yields when it started."""
        started_at = time.monotonic()
        self.changed_at = dict.fromkeys(self.signs, started_at)
        self.watched = list(ranks)
        self.woken.set()
        try:
            yield started_at
        finally:
            self.watched = []

    def _silent(self, seconds: float) -> set[int]:
        """The ranks whose sign has not changed for some time."""
        now = time.monotonic()
        return {rank for rank, changed_at in self.changed_at.items() if now - changed_at > seconds}

    def _leave(self, exit_code: int, reason: str) -> None:
        if self.mine.exit_code is None:
            self.mine.exit_code, self.mine.reason = exit_code, reason
            self.woken.set()

    def _name(self, ranks: list[int]) -> str:
        return f"rank {', '.join(map(str, ranks))} of {self.world_size} is"

    def _exchange_signs(self) -> None:
        """The thread: no other one uses the store, which does not answer if its process is stopped."""
        while True:
            is_last = self.closing
            with suppress(RuntimeError, ValueError):  # the process that keeps the store is gone
                self._exchange()
            if is_last:
                return
            self.woken.wait(POLL_S if self.watched else self.interval_s)
            self.woken.clear()

    def _exchange(self) -> None:
        self.mine.beat += 1
        self.store.set(str(self.rank), json.dumps(asdict(self.mine)))
        present = [rank for rank in self.watched if self.store.check([str(rank)])]
        contents = self.store.multi_get([str(rank) for rank in present]) if present else []
        for rank, content in zip(present, contents, strict=True):
            sign = Sign(**json.loads(content))
            if sign != self.signs[rank]:
                self.signs[rank], self.changed_at[rank] = sign, time.monotonic()


@contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Ignore SIGTERM within this context, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _explain_end(error: BaseException | None) -> tuple[int, str]:
    """Exit code of this rank, and the reason that the others print; none if another rank is the reason."""
    if error is None:
        return 0, ""
    if isinstance(error, RankLost):
        return error.exit_code, ""
    explained = explain_error(error)
    return explained or (ProcessLost.exit_code, " ".join(f"{type(error).__name__}: {error}".split()))
