"""What would make a run cheaper: measurements of a run to a suggestion, or None where it does not apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoulders.config.recipe import Recipe
from shoulders.config.student import Bottleneck, Conv, Lora
from shoulders.planning.watch import BACKWARD, BASE, DECODE, FORWARD, TEACHER, TRANSFER, WAITING
from shoulders.storage.atomic import size_text

MIN_SAVING = 0.05  # of a step: less is not suggested


@dataclass(frozen=True)
class Measurements:
    """What is known of a run; seconds are those of one step.

    Args:
        recipe: of the run.
        step_s: seconds of a whole step.
        parts: seconds of what runs one after another in it.
        decode_s: seconds of one worker for a batch.
        cpus: that this process may use.
        peak_bytes, available_bytes: of memory.
        accumulate: train.accumulate with which the step fits into memory.
        projector_width: hidden width of the projectors.
        block_share: share of the projectors' weights that read other layers than the latent.
        cache: estimate of a cache, with its path and views; None where there can be none, or is one.
        bf16_s: seconds of a step in bf16 without its loader, where the hardware supports it and it is off.
        int8_s: seconds of the teachers that can run in int8 and do not, in int8.
    """

    recipe: Recipe
    step_s: float
    parts: Mapping[str, float]
    decode_s: float
    cpus: int
    peak_bytes: int
    available_bytes: int
    accumulate: int
    projector_width: int
    block_share: float
    cache: Mapping[str, Any] | None = None
    bf16_s: float | None = None
    int8_s: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, *parts: str) -> float:
        """Seconds of some parts together."""
        return sum(self.parts.get(part, 0.0) for part in parts)

    @property
    def teachers_s(self) -> float:
        """Seconds of the teachers, the base among them where it is one."""
        return self.seconds(BASE, *(part for part in self.parts if part.startswith(TEACHER)))

    def share_saved(self, seconds: float) -> float:
        """Share of a step that is saved with so many seconds less: no step is faster than its loader."""
        workers = self.recipe.images.workers
        after = max(self.step_s - seconds, self.decode_s / workers if workers else 0.0)
        return max(0.0, 1 - after / self.step_s)


@dataclass(frozen=True)
class Suggestion:
    """Overrides of the recipe, the share of a step that they save (None: without them it does not run), the reason."""

    overrides: tuple[str, ...]
    saves: float | None
    reason: str


def accumulate(measured: Measurements) -> Suggestion | None:
    """More micro-batches, where a step does not fit into memory."""
    fits = measured.peak_bytes <= measured.available_bytes
    if fits or measured.accumulate == measured.recipe.train.accumulate:
        return None
    reason = (
        f"the run as it is needs {size_text(measured.peak_bytes)} of memory, and {size_text(measured.available_bytes)} "
        "are available"
    )
    return Suggestion((f"train.accumulate={measured.accumulate}",), None, reason)


def cache(measured: Measurements) -> Suggestion | None:
    """A cache of the teachers' features."""
    estimate, recipe = measured.cache, measured.recipe
    if estimate is None:
        return None
    overrides = [f"images.views={estimate['views']}"] if recipe.images.views == "fresh" else []
    overrides += [f"cache.path={estimate['path']}"] if recipe.cache.path is None else []
    reason = (
        f"the teachers take {measured.teachers_s / measured.step_s:.0%} of a step; a cache of their features "
        f"(shoulders cache with the same overrides) takes {size_text(estimate['disk_bytes'])} and "
        f"{estimate['minutes']:.1f} minutes, once"
    )
    return Suggestion(tuple(overrides), measured.share_saved(measured.teachers_s), reason)


def bf16(measured: Measurements) -> Suggestion | None:
    """bf16, where the hardware supports it and it is off."""
    if measured.bf16_s is None:
        return None
    saved = measured.step_s - measured.seconds(WAITING, DECODE) - measured.bf16_s
    reason = f"measured: {1000 * measured.bf16_s:.0f} ms per step in bf16, which this hardware supports"
    return Suggestion(("train.precision=bf16",), measured.share_saved(saved), reason)


def int8(measured: Measurements) -> Suggestion | None:
    """int8, for the teachers that it makes faster."""
    saved = {name: measured.seconds(TEACHER + name) - seconds for name, seconds in measured.int8_s.items()}
    faster = [name for name, seconds in saved.items() if seconds > 0]
    if not faster:
        return None
    overrides = tuple(f"teachers.{name}.int8=true" for name in faster)
    reason = "measured; a teacher that loses too much accuracy is refused before the run"
    return Suggestion(overrides, measured.share_saved(sum(saved[name] for name in faster)), reason)


def workers(measured: Measurements) -> Suggestion | None:
    """More processes that decode, where the step waits for them and there are cores."""
    now, waited = measured.recipe.images.workers, measured.seconds(WAITING, DECODE)
    busy = measured.step_s - waited
    enough = max(now + 1, math.ceil(measured.decode_s / max(busy, 1e-9)))
    more = min(enough, measured.cpus)
    if more <= now:
        return None
    reason = (
        f"a step waits {1000 * waited:.0f} ms for images; one worker decodes a batch in "
        f"{1000 * measured.decode_s:.0f} ms"
    )
    saved = max(0.0, 1 - max(busy, measured.decode_s / more) / measured.step_s)
    return Suggestion((f"images.workers={more}",), saved, reason)


def latent_only(measured: Measurements) -> Suggestion | None:
    """Projectors that read the latent alone, where they take longer than the student."""
    if not _projectors_are_slow(measured) or not measured.block_share:
        return None
    no_blocks = ["student.adapter.blocks=[]"] if isinstance(measured.recipe.student.adapter, Conv) else []
    overrides = ("transfer.layers=[latent]", *no_blocks)
    saved = measured.seconds(TRANSFER) * measured.block_share
    reason = (
        f"{_shares(measured)}; {measured.block_share:.0%} of their weights read blocks, which heads that need detail "
        "may miss"
    )
    return Suggestion(overrides, measured.share_saved(saved), reason)


def narrower(measured: Measurements) -> Suggestion | None:
    """Projectors of half the width, where they take longer than the student."""
    if not _projectors_are_slow(measured) or measured.projector_width < 2:
        return None
    reason = f"{_shares(measured)}; an upper bound, because the loss takes as long as before"
    overrides = (f"transfer.projector_width={measured.projector_width // 2}",)
    return Suggestion(overrides, measured.share_saved(measured.seconds(TRANSFER) / 2), reason)


def side(measured: Measurements) -> Suggestion | None:
    """An adapter beside the base, where the backward pass through the base is the longest part."""
    if not isinstance(measured.recipe.student.adapter, Bottleneck | Lora) or not measured.parts:
        return None
    if measured.seconds(BACKWARD) < max(measured.parts.values()):
        return None
    # the base then runs once, for the student and as a teacher
    saved = measured.seconds(BACKWARD) + min(measured.seconds(FORWARD), measured.seconds(BASE))
    reason = "no gradient goes through the base then; an upper bound, because the adapter itself takes some time"
    return Suggestion(("student.adapter={kind: side}",), measured.share_saved(saved), reason)


ADVICE: tuple[Callable[[Measurements], Suggestion | None], ...] = (
    accumulate,
    cache,
    bf16,
    int8,
    workers,
    latent_only,
    narrower,
    side,
)


def suggestions(measured: Measurements) -> list[Suggestion]:
    """Those that apply: first what the run needs, then by what they save."""
    applicable = [one for advise in ADVICE if (one := advise(measured)) is not None]
    worthwhile = [one for one in applicable if one.saves is None or one.saves >= MIN_SAVING]
    return sorted(worthwhile, key=lambda one: -math.inf if one.saves is None else -one.saves)


def _projectors_are_slow(measured: Measurements) -> bool:
    return measured.seconds(TRANSFER) > measured.seconds(FORWARD, BACKWARD)


def _shares(measured: Measurements) -> str:
    projectors, student = (
        seconds / measured.step_s for seconds in (measured.seconds(TRANSFER), measured.seconds(FORWARD, BACKWARD))
    )
    return f"projectors and loss take {projectors:.0%} of a step, the student {student:.0%}"
