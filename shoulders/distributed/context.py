"""One process or many under torchrun: rank, world size, device, and the exchanges between ranks."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from shoulders.distributed.device import this_device
from shoulders.distributed.peers import Peers
from shoulders.errors import RankLost, printable

TIMEOUT = timedelta(minutes=2)  # of one exchange: a lost rank ends the others within it
STUCK_MARGIN = timedelta(seconds=20)  # after the timeout of an exchange
NCCL_MARGIN = timedelta(minutes=1)  # NCCL aborts the process after its timeout: gloo reports a lost rank before that
_SESSION = itertools.count()  # the ranks of a program meet as often
EXCHANGE_FAILED = ("gloo", "NCCL", "Application timeout")  # phrases in errors of torch


@dataclass(frozen=True)
class DistContext:
    """This process among ``world_size`` processes; rank 0 of 1 without torchrun.

    Attributes:
        rank: the number of this process.
        world_size: the number of processes.
        device: where this process computes.
        control_group: gloo group for flags and Python objects, which are on the CPU whatever the device.
        peers: what this rank knows of the others.
    """

    rank: int
    world_size: int
    device: torch.device
    control_group: distributed.ProcessGroup | None = None
    peers: Peers | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def log(self, line: str) -> None:
        """Print a line to stderr, above a progress bar, on the main rank."""
        if self.is_main:
            tqdm.write(printable(line), file=sys.stderr)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the ranks."""
        if self.world_size == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total / self.world_size

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean of each scalar over the ranks where it is not NaN, in one exchange."""
        values = torch.stack([scalar.detach() for scalar in scalars.values()])
        valid = ~values.isnan()
        total, count = self.mean(torch.stack([values.where(valid, 0), valid.to(values.dtype)]))
        return dict(zip(scalars, (total / count).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank; every rank gets the same result."""
        if self.world_size == 1:
            return flag
        highest = torch.tensor(int(flag))
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX, group=self.control_group)
        return bool(highest)

    def gather(self, value: object) -> list:
        """The values of all ranks, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self.control_group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks, for as long as they show signs of life."""
        if self.peers is not None:
            self.peers.barrier()


@contextmanager
def init_distributed(timeout: timedelta = TIMEOUT) -> Iterator[DistContext]:
    """Join the process group that torchrun started, if any, and leave it at the end.

    Args:
        timeout: of one exchange between ranks.

    Raises:
        RankLost: another rank ended, is stopped, or takes part in no exchange.
    """
    device = this_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield DistContext(0, 1, device)
        return
    with _end_if_stuck(timeout):
        store, rank, world_size = _meet(timeout)
    store = distributed.PrefixStore(f"{next(_SESSION)}", store)  # torchrun keeps what an earlier session wrote
    signs = store.clone()  # type: ignore[attr-defined]  # missing in the types of torch
    with Peers(distributed.PrefixStore("signs", signs), rank, world_size, timeout) as peers:
        try:
            with _end_if_stuck(timeout):
                control_group = _init_groups(store, rank, world_size, device, timeout)
            yield DistContext(rank, world_size, device, control_group, peers)
        except RuntimeError as error:
            if not _is_failed_exchange(error):
                raise
            _destroy_groups(device, is_rank_lost=True)
            raise peers.lost() from error
        finally:
            _destroy_groups(device, is_rank_lost=isinstance(sys.exception(), RankLost))


@contextmanager
def _end_if_stuck(timeout: timedelta) -> Iterator[None]:
    """End the process if this context takes too long: torch waits forever for a store whose process is stopped."""
    timer = threading.Timer((timeout + STUCK_MARGIN).total_seconds(), _end_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process() -> None:
    print("shoulders: another rank, or what started it, is stopped; start all ranks again", file=sys.stderr, flush=True)
    os._exit(RankLost.exit_code)


def _meet(timeout: timedelta) -> tuple[distributed.Store, int, int]:
    """The store in which all ranks meet, the rank of this process, and their number."""
    try:
        return next(distributed.rendezvous("env://", timeout=timeout))
    except distributed.DistError as error:
        seconds = timeout.total_seconds()
        raise RankLost(f"not all ranks started within {seconds:g} s; start all of them again") from error


def _init_groups(
    store: distributed.Store, rank: int, world_size: int, device: torch.device, timeout: timedelta
) -> distributed.ProcessGroup:
    """Make the default group, for tensors on ``device``, and return a gloo group."""
    backend, margin = ("nccl", NCCL_MARGIN) if device.type == "cuda" else ("gloo", timedelta())
    groups = distributed.PrefixStore("groups", store)
    distributed.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout + margin)
    return distributed.new_group(timeout=timeout, backend="gloo")


def _destroy_groups(device: torch.device, is_rank_lost: bool) -> None:
    """Close the connections to the other ranks; not those of NCCL to a lost rank, which would wait for it."""
    if distributed.is_initialized() and not (is_rank_lost and device.type == "cuda"):
        distributed.destroy_process_group()


def _is_failed_exchange(error: RuntimeError) -> bool:
    """Whether an exchange failed; its reason is not part of such an error."""
    is_phrase_in = any(phrase in str(error) for phrase in EXCHANGE_FAILED)
    return isinstance(error, distributed.DistError) or is_phrase_in
