"""Where the time of a step goes: real steps, timed as a whole, and timed part by part with a stop watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.features import Batch, Features
from shoulders.teachers import AnyTeachers, Teachers
from shoulders.training.batches import RunBatches
from shoulders.training.step import BASE_FORWARD, UPDATE, TrainStep

STEPS = 5  # measured; their median is reported
MAX_SECONDS = 60.0  # no further step starts after this time
PREFETCHED = 2  # batches that each worker has ready: the steps that use them do not count

DECODE, WAITING = "decode", "waiting for images"  # without workers, and with them
TEACHER, CACHE, BASE = "teacher ", "reading the cache", "base, as a teacher"  # the first with the teacher's name
FORWARD, BACKWARD = "student, forward", "student, backward"
TRANSFER, OPTIMIZER, REST = "projectors and loss", "optimizer", "all else"
SECTIONS = {BASE_FORWARD: BASE, UPDATE: OPTIMIZER}  # of `TrainStep`
Seconds = dict[str, float]  # by part
StepFunction = Callable[[int, Batch], object]


class StopWatch:
    """A stop watch that is read at every border between two parts of a step; it waits for the device each time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        """Start a step."""
        self.spent: Seconds = {}
        self.current = REST  # the part that runs until the next one starts
        self.last = self._now()

    def lap(self, part: str) -> None:
        """Add the time since the last reading to a part."""
        now = self._now()
        self.spent[part] = self.spent.get(part, 0.0) + now - self.last
        self.last = now

    def begin(self) -> None:
        """Start a part: the time until now belongs to the one before."""
        self.lap(self.current)

    def end(self, part: str, then: str = REST) -> None:
        """End a part; ``then`` is the part that follows."""
        self.lap(part)
        self.current = then

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A section of `TrainStep`, as a part."""
        self.begin()
        yield
        self.end(SECTIONS[name])

    def watch_gradient(self, student_features: Mapping[str, Features]) -> None:
        """Read the watch when the backward pass leaves projectors and loss and reaches the student."""

        def reached(gradient: Tensor) -> None:
            if self.current == TRANSFER:  # the first of these gradients; those of all later tensors are ready by then
                self.end(TRANSFER, then=BACKWARD)

        for features in student_features.values():
            for x in features.components().values():
                if x.requires_grad:
                    x.register_hook(reached)

    @contextmanager
    def attached(self, step: TrainStep) -> Iterator[None]:
        """A context in which the models of a step are timed, by forward hooks."""

        def after_encoder(module: nn.Module, inputs: Any, output: dict[str, Features]) -> None:
            self.end(FORWARD, then=TRANSFER)
            self.watch_gradient(output)

        with ExitStack() as hooks:

            def before(module: nn.Module) -> None:
                hooks.callback(module.register_forward_pre_hook(lambda *_: self.begin()).remove)

            def after(module: nn.Module, hook: Callable[..., None]) -> None:
                hooks.callback(module.register_forward_hook(hook).remove)

            for part, teacher in timed_teachers(step.teachers).items():
                before(teacher)
                after(teacher, lambda *_, part=part: self.end(part))
            before(step.module.student.encoder)
            after(step.module.student.encoder, after_encoder)
            after(step.module, lambda *_: self.end(TRANSFER, then=TRANSFER))
            yield

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def timed_teachers(teachers: AnyTeachers) -> dict[str, nn.Module]:
    """Each live teacher as a part of its own, or the cache as one part."""
    if isinstance(teachers, Teachers):
        return {TEACHER + name: teachers[name] for name in teachers.selected}
    return {CACHE: teachers}


def timed(step: TrainStep, watch: StopWatch) -> StepFunction:
    """The step, with its parts timed; nothing can be timed in a compiled one."""
    sectioned = replace(step, section=watch.section, compile=False)

    def run(number: int, batch: Batch) -> None:
        with watch.attached(sectioned):
            sectioned(number, batch)

    return run


def measure_steps(steps: Sequence[StepFunction], batches: RunBatches, watch: StopWatch) -> list[list[Seconds]]:
    """Seconds by part of real steps, in turns, so that a drift of the machine affects all of them.

    Without `timed` a step has two parts, its batch and everything else. The first step of each is left out, because it
    sets things up, and so are those whose batches the workers prepared meanwhile.
    """
    workers, variants = batches.settings.workers, len(steps)
    last = variants * (1 + STEPS) + PREFETCHED * workers
    end = time.perf_counter() + MAX_SECONDS
    rows: list[Seconds] = []
    with closing(batches.training(0, last)) as stream:
        for number, batch in enumerate(_waited_for(stream, watch, WAITING if workers else DECODE)):
            steps[number % variants](number + 1, batch)
            watch.begin()  # the next step
            rows.append(watch.spent)
            if len(rows) >= 2 * variants and time.perf_counter() > end:
                break
    return [rows[variants + first :: variants][-STEPS:] for first in range(variants)]


def _waited_for(stream: Iterator[Batch], watch: StopWatch, part: str) -> Iterator[Batch]:
    """The same batches; the time until a batch arrives is a part of its step."""
    watch.start()
    for batch in stream:
        watch.lap(part)
        yield batch
        watch.start()


def medians(rows: list[Seconds]) -> Seconds:
    """The median of each part."""
    parts = dict.fromkeys(part for row in rows for part in row)
    return {part: median(row.get(part, 0.0) for row in rows) for part in parts}


def seconds_to_decode(batches: RunBatches, first_step: int) -> float:
    """Seconds of one worker for a batch, with nothing else running; without workers, of this process."""
    settings = batches.settings.model_copy(update={"workers": min(1, batches.settings.workers)})
    end = time.perf_counter() + MAX_SECONDS
    arrivals = []
    with closing(replace(batches, settings=settings).training(first_step, first_step + 1 + STEPS)) as stream:
        for _ in stream:
            arrivals.append(time.perf_counter())
            if len(arrivals) > 1 and arrivals[-1] > end:
                break
    return median(after - before for before, after in zip(arrivals, arrivals[1:], strict=False))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes the second time."""
    watch = StopWatch(device)
    for _ in range(2):
        watch.start()
        work()
        watch.lap(REST)
    return watch.spent[REST]
