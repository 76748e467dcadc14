"""One process or many under torchrun: who am I, which device, and what all ranks must agree on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shoulders.distributed.device import this_device

WRITING = timedelta(hours=2)


@dataclass(frozen=True)
class DistContext:
    """This process among ``world`` ones; rank 0 of 1 without torchrun."""

    index: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # ranks talk here of what is not on the device, without waiting for it
    patient: dist.ProcessGroup | None = None  # and wait here for one that writes

    @property
    def is_main(self) -> bool:
        """The one that writes and prints."""
        return self.index == 0

    def log(self, line: str) -> None:
        """A line for the person who watches."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the ranks."""
        if self.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world

    def means(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The mean of each scalar over the ranks where it is a number, in one exchange."""
        mine = torch.stack([value.detach() for value in values.values()])
        known = ~mine.isnan()
        total, count = self.mean(torch.stack([mine.where(known, 0), known.to(mine.dtype)]))
        return dict(zip(values, (total / count).tolist(), strict=True))

    def any(self, claim: bool) -> bool:
        """Whether the claim holds on any rank: all then act alike."""
        if self.world == 1:
            return claim
        flag = torch.tensor(int(claim))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def gather(self, mine: object) -> list:
        """What every rank has to say, in the order of ranks."""
        if self.world == 1:
            return [mine]
        everything: list = [None] * self.world
        dist.all_gather_object(everything, mine, group=self.control)
        return everything

    def barrier(self) -> None:
        """Wait for all ranks, as long as writing a large model to a slow disk may take."""
        if self.world > 1:
            dist.barrier(self.patient)


@contextmanager
def join(timeout_s: int = 120) -> Iterator[DistContext]:
    """Join the other ranks that torchrun started, if any; a lost rank ends the others within ``timeout_s``."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = this_device(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield DistContext(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        control, patient = dist.new_group(backend="gloo"), dist.new_group(timeout=WRITING, backend="gloo")
        yield DistContext(dist.get_rank(), world, device, control, patient)
    finally:
        dist.destroy_process_group()
