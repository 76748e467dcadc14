"""One process is rank 0 of 1; means over ranks leave out NaN."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import pytest
import torch
from torch import Tensor

from shoulders.distributed.context import DistContext, init_distributed
from shoulders.distributed.signals import catch_signals
from shoulders.errors import Interrupted


def test_one_process_is_the_main_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with init_distributed() as dist:
        assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
        assert dist.mean(torch.tensor(3.0)) == 3 and dist.means({"a": torch.tensor(2.0)}) == {"a": 2.0}
        assert (dist.any(True), dist.any(False), dist.gather("x")) == (True, False, ["x"])
        dist.barrier()
        dist.log("a line")
    assert capsys.readouterr().err == "a line\n"
    DistContext(1, 2, torch.device("cpu")).log("a line")
    assert capsys.readouterr().err == ""


def test_a_scalar_is_averaged_over_the_ranks_that_have_it() -> None:
    class TwoRanks(DistContext):
        """Rank 0 of two; the other one has 4 for the first scalar and NaN for the others."""

        def mean(self, value: Tensor) -> Tensor:
            other = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
            return (value + other) / 2

    means = TwoRanks(0, 2, torch.device("cpu")).means(
        {"both": torch.tensor(2.0), "one": torch.tensor(5.0), "none": torch.tensor(math.nan)}
    )
    assert means["both"] == 3.0 and means["one"] == 5.0 and math.isnan(means["none"])


def test_signals_are_collected_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), catch_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # within a second of the first: launchers send several
        time.sleep(0.01)
        assert received == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_signal_that_clusters_send_before_the_limit_is_collected() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Interrupted), catch_signals() as received:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert received == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_later_second_interrupt_ends_the_process_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), catch_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_other_threads_catch_no_signals() -> None:
    received: list[list[int]] = []

    def work() -> None:
        with catch_signals() as signals:
            received.append(signals)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert received == [[]]
