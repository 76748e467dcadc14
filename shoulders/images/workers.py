"""Worker processes that decode and render batches ahead of the training step."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from shoulders.errors import DataError
from shoulders.images.view_datasets import Rendered, Views

GRACE_S = 20  # a worker that receives SIGTERM ends after this time, so that the main process can save a checkpoint


def prefetch(views: Views, items: Iterable[NDArray[np.int64]], workers: int) -> Iterator[Rendered]:
    """``views[item]`` for each item, in order, computed by worker processes.

    Args:
        views: the data set.
        items: its arguments, one for each batch.
        workers: number of processes; 0: this process.

    Raises:
        DataError: the first one that ``views`` returns.
    """
    loader: DataLoader[Rendered | DataError] = DataLoader(
        views,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each pass would draw a number from the global generator
        # fork shares the list of images and starts in milliseconds; workers use neither CUDA nor threads
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork in a process with threads; the workers take no lock that a thread may hold
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        rendered_ahead = iter(loader)
    try:
        for rendered in rendered_ahead:
            if isinstance(rendered, DataError):
                raise rendered
            yield rendered
    finally:
        del rendered_ahead  # ends the workers now, and not when a traceback releases this frame


def _identity(rendered: Any) -> Any:
    return rendered


def _start_worker(number: int) -> None:
    """Leave signals to the main process: a launcher may send them to the whole process group.

    A worker ends when the main process closes its queue or is gone. After SIGTERM it ends within `GRACE_S`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
