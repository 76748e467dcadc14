"""One process or many under torchrun: who am I, which device, and what all ranks must agree on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

WRITING = timedelta(hours=2)


@dataclass(frozen=True)
class Rank:
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

    def say(self, line: str) -> None:
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
def join(timeout_s: int = 120) -> Iterator[Rank]:
    """Join the other ranks that torchrun started, if any; a lost rank ends the others within ``timeout_s``."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = this_device(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Rank(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        control, patient = dist.new_group(backend="gloo"), dist.new_group(timeout=WRITING, backend="gloo")
        yield Rank(dist.get_rank(), world, device, control, patient)
    finally:
        dist.destroy_process_group()


def this_device(local: int = 0) -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: with ``auto``, where the hardware has it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ask = getattr(torch.cpu, "get_capabilities", None)  # older torch cannot tell
    capabilities = ask() if ask else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put themselves into.

    Launchers send a signal more than once; only a second Ctrl-C, a second or more after the first, ends the process
    at once. Outside the main thread, where no signal arrives, the list stays empty.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    first: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        first.append(time.monotonic())
        if number == signal.SIGINT and first[-1] - first[0] > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
