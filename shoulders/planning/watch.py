"""Where the time of a step goes: real steps of a run, whole, and with a stop watch read at the border of every part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from shoulders.distillation import Run
from shoulders.feature_cache import CachedTeachers
from shoulders.features import Features
from shoulders.images import batches

STEPS = 5  # whose median is told
SECONDS = 60.0  # after which no further step is begun
AHEAD = 2  # batches that each worker has ready: the steps that they would flatter do not count

DECODE, WAITING = "decode", "waiting for images"  # within the step, or beside it by workers
TEACHER, CACHE, BASE = "teacher ", "reading the cache", "base, asked as a teacher"  # the first with its name
FORWARD, BACKWARD = "student, forward", "student, backward"
TRANSFER, OPTIMIZER, REST = "projectors and loss", "optimizer", "all else"
Seconds = dict[str, float]  # by part
Turn = Callable[[], AbstractContextManager[None]]


class Watch:
    """A stop watch that is read at every border between two parts of a step; the device is waited for each time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.spent: Seconds = {}
        self.between = REST  # what goes on until the next part begins
        self.last = self._now()

    def lap(self, part: str) -> None:
        """What was done since the watch was last read belongs to this part."""
        now = self._now()
        self.spent[part] = self.spent.get(part, 0.0) + now - self.last
        self.last = now

    def timed(self, part: str, work: Callable[..., Any], then: str = REST) -> Callable[..., Any]:
        """The same work as a part of its own; ``then`` is what goes on after it."""

        def watched(*args: Any, **how: Any) -> Any:
            self.lap(self.between)
            answer = work(*args, **how)
            self.lap(part)
            self.between = then
            return answer

        return watched

    def at_border(self, seen: dict[str, Features]) -> None:
        """Read the watch where the way back leaves the projectors and enters the student."""

        def reached(gradient: Tensor) -> None:
            if self.between == TRANSFER:  # the first one: all that was made later has gone its way back by then
                self.lap(TRANSFER)
                self.between = BACKWARD

        for x in (x for features in seen.values() for x in features.components().values()):
            if x.requires_grad:
                x.register_hook(reached)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def watched(run: Run, watch: Watch) -> Iterator[None]:
    """Within this context the parts of every step of the run are timed."""
    student, teachers = run.student, run.teachers
    whom = (
        {CACHE: teachers}
        if isinstance(teachers, CachedTeachers)
        else {TEACHER + name: teachers[name] for name in teachers.selected}
    )
    places = watch.timed(FORWARD, student.forward_features)

    def seen_by_student(*args: Any) -> dict[str, Features]:
        seen = places(*args)
        watch.at_border(seen)
        return seen

    stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
        *((teacher, "forward", watch.timed(part, teacher.forward)) for part, teacher in whom.items()),
        (student.encoder, "base_features", watch.timed(BASE, student.encoder.base_features)),
        (student, "forward_features", seen_by_student),
        (run.learner, "compute_loss", watch.timed(TRANSFER, run.learner.compute_loss, then=TRANSFER)),
        (run.optimization, "step", watch.timed(OPTIMIZER, run.optimization.step)),
    ]
    with ExitStack() as undo:
        for owner, method, stand_in in stand_ins:
            own = vars(owner).get(method)  # what was compiled stands before the method of the class already
            undo.callback(delattr, owner, method) if own is None else undo.callback(setattr, owner, method, own)
            setattr(owner, method, stand_in)
        yield


@contextmanager
def whole(run: Run, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context steps are as they are in a run, compiled if they are."""
    eager, run.forward = run.forward, forward
    yield
    run.forward = eager


@contextmanager
def in_bf16(run: Run) -> Iterator[None]:
    """Within this context a run in fp32 is one in bf16."""
    before = run.teachers.bf16, run.autocast
    run.teachers.bf16, run.autocast = True, partial(torch.autocast, run.dist.device.type, torch.bfloat16)
    yield
    run.teachers.bf16, run.autocast = before


def steps(run: Run, watch: Watch, turns: Sequence[Turn]) -> list[list[Seconds]]:
    """Seconds by part of real steps, taken by turns under several contexts, so that all meet the same weather.

    Without `watched` a step has two parts, the batch and all else. Of each context the first step, which sets things
    up, is left out, and so are those that the batches made meanwhile would flatter.
    """
    workers, many = run.recipe.images.workers, len(turns)
    most = many * (1 + STEPS) + AHEAD * workers
    end = time.perf_counter() + SECONDS
    told: list[Seconds] = []
    with closing(run._batches(0, most, 0, 1)) as stream:
        for number, batch in enumerate(_waited_for(stream, watch, WAITING if workers else DECODE)):
            with turns[number % many]():
                run.step(number + 1, batch)
                watch.lap(watch.between)
            told.append(watch.spent)
            if len(told) >= 2 * many and time.perf_counter() > end:
                break
    return [told[many + turn :: many][-STEPS:] for turn in range(many)]


def _waited_for(stream: Iterator[Any], watch: Watch, part: str) -> Iterator[Any]:
    """The same batches; what each was waited for is a part of its step."""
    watch.start()
    for batch in stream:
        watch.lap(part)
        yield batch
        watch.start()


def medians(rows: list[Seconds]) -> Seconds:
    """The median of each part."""
    parts = dict.fromkeys(part for row in rows for part in row)
    return {part: median(row.get(part, 0.0) for row in rows) for part in parts}


def seconds_to_decode(run: Run, first: int) -> float:
    """Seconds that one worker takes over a batch, with nobody else at work; without workers, this process."""
    how, train = run.recipe.images, run.recipe.train
    alone = how.model_copy(update={"workers": min(1, how.workers)})
    end = time.perf_counter() + SECONDS
    stream = batches(
        run.images,
        run.drawn,
        alone,
        batch=train.batch,
        seed=train.seed,
        first_step=first,
        steps=1 + STEPS,
        decode_sizes=run.sizes,
    )
    arrived = []
    with closing(stream):
        for _ in stream:
            arrived.append(time.perf_counter())
            if len(arrived) > 1 and arrived[-1] > end:
                break
    return median(after - before for before, after in zip(arrived, arrived[1:], strict=False))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes the second time."""
    watch = Watch(device)
    for _ in range(2):
        watch.start()
        work()
        watch.lap(REST)
    return watch.spent[REST]
