"""Worker processes that decode and render batches ahead of the training step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from shoulders.errors import DataError, ProcessLost
from shoulders.images.view_datasets import Rendered, Views

GRACE_S = 20  # a worker that receives SIGTERM ends after this time, so that the main process can save a checkpoint
EXIT_S = 2  # a worker that stops answering has an exit code after this time
MAX_NAMED = 3  # workers in a message


def prefetch(views: Views, items: Iterable[NDArray[np.int64]], workers: int) -> Iterator[Rendered]:
    """``views[item]`` for each item, in order, computed by worker processes.

    Args:
        views: the data set.
        items: its arguments, one for each batch.
        workers: number of processes; 0: this process.

    Raises:
        DataError: the first one that ``views`` returns.
        ProcessLost: a worker died; it names the image that the worker decoded.
    """
    views.share(workers)
    loader: DataLoader[Rendered | DataError] = DataLoader(
        views,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, views),
        generator=torch.Generator(),  # else each pass would draw a number from the global generator
        # fork shares the list of images and starts in milliseconds; workers use neither CUDA nor threads
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    known = set(multiprocessing.active_children())
    with warnings.catch_warnings(), _keep_child_handler():
        # Python 3.12 warns of every fork in a process with threads; the workers take no lock that a thread may hold
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        rendered_ahead = iter(loader)
    processes = [child for child in multiprocessing.active_children() if child not in known]
    try:
        for rendered in rendered_ahead:
            if isinstance(rendered, DataError):
                raise rendered
            yield rendered
    except (RuntimeError, OSError, EOFError) as error:  # a batch cannot be received when its sender has died
        lost = _lost_workers(processes, views)
        if not lost:
            raise
        for process in processes:
            if process.pid in views.decoding[:, 0]:
                process.kill()  # it may wait for a lock that the lost one holds
                process.join()
        raise ProcessLost(lost) from error
    finally:
        del rendered_ahead  # ends the workers now, and not when a traceback releases this frame


@contextmanager
def _keep_child_handler() -> Iterator[None]:
    """Keep the handler of SIGCHLD: that of torch raises the error of a worker wherever the program is."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None:  # None: it was not set by Python
            signal.signal(signal.SIGCHLD, handler)


def _lost_workers(processes: Sequence[BaseProcess], views: Views) -> str:
    """Which workers died, of what, and the image that each decoded last; empty if none died."""
    ended = wait([process.sentinel for process in processes], EXIT_S) if processes else []
    for process in processes:
        if process.sentinel in ended:
            process.join()  # its exit code comes shortly after
    exit_codes = {process.pid: process.exitcode for process in processes}
    lost = []
    for number, (pid, index) in enumerate(views.decoding.tolist()):
        if code := exit_codes.get(pid):
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            image = repr(views.images.name(index)) if index >= 0 else "none"
            lost.append(f"worker {number} (process {pid}) died ({reason}); its last image: {image}")
    if not lost:
        return ""
    return f"{'; '.join(lost[:MAX_NAMED])}; remove that image, or lower images.workers if the memory was full"


def _identity(rendered: Any) -> Any:
    return rendered


def _start_worker(views: Views, number: int) -> None:
    """Write down the process id, and leave signals to the main process.

    A launcher may send them to the whole process group. A worker ends when the main process closes its queue or is
    gone. After SIGTERM it ends within `GRACE_S`.
    """
    views.decoding[number, 0] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
