"""What transformers prints is silenced where the package loads or writes models, and nowhere else."""

from __future__ import annotations

import threading

from transformers.utils import logging

from shoulders.hub.weights import quiet


def state() -> tuple[int, bool]:
    return logging.get_verbosity(), logging.is_progress_bar_enabled()


def test_threads_that_are_quiet_at_once_leave_the_settings_as_they_were() -> None:
    before = state()
    first_is_inside, first_may_end = threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            first_is_inside.set()
            first_may_end.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    first_is_inside.wait(30)
    with quiet():
        first_may_end.set()
        thread.join()
        assert state() == (logging.ERROR, False)  # although the first one has ended
    assert state() == before != (logging.ERROR, False)
