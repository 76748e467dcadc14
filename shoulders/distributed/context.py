"""One process or many under torchrun: rank, world size, device, and the exchanges between ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from shoulders.distributed.device import this_device
from shoulders.errors import printable

TIMEOUT = timedelta(minutes=2)  # of one exchange: a lost rank ends the others within it
WRITE_TIMEOUT = timedelta(hours=2)  # of a barrier: the main rank may write a large model to a slow disk


@dataclass(frozen=True)
class DistContext:
    """This process among ``world_size`` processes; rank 0 of 1 without torchrun.

    Attributes:
        rank: the number of this process.
        world_size: the number of processes.
        device: where this process computes.
        control_group: gloo group for flags and Python objects, which are on the CPU whatever the device.
        barrier_group: gloo group for barriers, with the long timeout `WRITE_TIMEOUT`.
    """

    rank: int
    world_size: int
    device: torch.device
    control_group: distributed.ProcessGroup | None = None
    barrier_group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def log(self, line: str) -> None:
        """Print a line to stderr, on the main rank."""
        if self.is_main:
            print(printable(line), file=sys.stderr, flush=True)

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
        """Wait for all ranks, at most `WRITE_TIMEOUT`."""
        if self.world_size > 1:
            distributed.barrier(self.barrier_group)


@contextmanager
def init_distributed(timeout: timedelta = TIMEOUT) -> Iterator[DistContext]:
    """Join the process group that torchrun started, if any, and leave it at the end.

    Args:
        timeout: of one exchange between ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = this_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield DistContext(0, 1, device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        control_group = distributed.new_group(backend="gloo")
        barrier_group = distributed.new_group(timeout=WRITE_TIMEOUT, backend="gloo")
        yield DistContext(distributed.get_rank(), world_size, device, control_group, barrier_group)
    finally:
        distributed.destroy_process_group()
