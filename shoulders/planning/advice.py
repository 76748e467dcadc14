"""What would make a run cheaper: facts of a plan -> a suggestion, or None where it does not apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoulders.config.recipe import Recipe
from shoulders.config.student import Bottleneck, Conv, Lora
from shoulders.planning.watch import BACKWARD, BASE, DECODE, FORWARD, TEACHER, TRANSFER, WAITING
from shoulders.storage.atomic import size_text

LEAST = 0.05  # of a step: what saves less is not worth a line


@dataclass(frozen=True)
class Facts:
    """What is known of a run; seconds are of one step.

    Args:
        step: a whole step.
        parts: what comes one after another in it.
        decode: of one worker that draws a batch.
        cpus: that this process may use.
        peak, there: bytes of memory that the run takes, and that there are.
        fits: train.accumulate with which it fits.
        hidden: width of the projectors.
        ladder: share of the projectors' weights that read other places than the latent.
        storing: what a cache would take, with its path and views; None where there can be none, or is one.
        in_bf16: a step without its loader, where bf16 is there and off.
        in_int8: of teachers that are not in int8 and can be, in int8.
    """

    recipe: Recipe
    step: float
    parts: Mapping[str, float]
    decode: float
    cpus: int
    peak: int
    there: int
    fits: int
    hidden: int
    ladder: float
    storing: Mapping[str, Any] | None = None
    in_bf16: float | None = None
    in_int8: Mapping[str, float] = field(default_factory=dict)

    def of(self, *parts: str) -> float:
        """Seconds of some parts together."""
        return sum(self.parts.get(part, 0.0) for part in parts)

    @property
    def teaching(self) -> float:
        """Seconds that the teachers take, the base among them where it is asked."""
        return self.of(BASE, *(part for part in self.parts if part.startswith(TEACHER)))

    def share_saved(self, seconds: float) -> float:
        """Share of a step that is saved where a part takes so much less: no step is faster than its loader."""
        workers = self.recipe.images.workers
        after = max(self.step - seconds, self.decode / workers if workers else 0.0)
        return max(0.0, 1 - after / self.step)


@dataclass(frozen=True)
class Suggestion:
    """Overrides to give, the share of a step that they save (None: without them it does not run), and why."""

    give: tuple[str, ...]
    saves: float | None
    why: str


def accumulate(facts: Facts) -> Suggestion | None:
    """The batch in parts, where memory does not hold it whole."""
    if facts.peak <= facts.there or facts.fits == facts.recipe.train.accumulate:
        return None
    why = f"as it is, it would take {size_text(facts.peak)} of memory, and {size_text(facts.there)} are here"
    return Suggestion((f"train.accumulate={facts.fits}",), None, why)


def cache(facts: Facts) -> Suggestion | None:
    """What the teachers say, stored once."""
    told, recipe = facts.storing, facts.recipe
    if told is None:
        return None
    changes = [f"images.views={told['views']}"] if recipe.images.views == "fresh" else []
    changes += [f"cache.path={told['path']}"] if recipe.cache.path is None else []
    why = (
        f"the teachers take {facts.teaching / facts.step:.0%} of a step; to store what they say (shoulders cache with "
        f"the same overrides) takes {size_text(told['disk_bytes'])} and {told['minutes']:.1f} minutes, once"
    )
    return Suggestion(tuple(changes), facts.share_saved(facts.teaching), why)


def bf16(facts: Facts) -> Suggestion | None:
    """bf16 where the hardware has it and it is off."""
    if facts.in_bf16 is None:
        return None
    saved = facts.step - facts.of(WAITING, DECODE) - facts.in_bf16
    why = f"measured: {1000 * facts.in_bf16:.0f} ms a step in bf16, which this hardware has"
    return Suggestion(("train.precision=bf16",), facts.share_saved(saved), why)


def int8(facts: Facts) -> Suggestion | None:
    """Teachers in int8, those that gain by it."""
    saved = {name: facts.of(TEACHER + name) - seconds for name, seconds in facts.in_int8.items()}
    gaining = [name for name, seconds in saved.items() if seconds > 0]
    if not gaining:
        return None
    give = tuple(f"teachers.{name}.int8=true" for name in gaining)
    why = "measured; a teacher that loses too much by it is refused before the run"
    return Suggestion(give, facts.share_saved(sum(saved[name] for name in gaining)), why)


def workers(facts: Facts) -> Suggestion | None:
    """More processes that decode, where the step waits for them and there are cores."""
    now, waited = facts.recipe.images.workers, facts.of(WAITING, DECODE)
    busy = facts.step - waited
    enough = max(now + 1, math.ceil(facts.decode / max(busy, 1e-9)))
    more = min(enough, facts.cpus)
    if more <= now:
        return None
    why = f"{1000 * waited:.0f} ms of a step wait for images; one worker draws a batch in {1000 * facts.decode:.0f} ms"
    return Suggestion((f"images.workers={more}",), max(0.0, 1 - max(busy, facts.decode / more) / facts.step), why)


def reads(facts: Facts) -> Suggestion | None:
    """Projectors that read the latent alone, where they take more than the student."""
    if not _projectors_are_much(facts) or not facts.ladder:
        return None
    beside = ["student.adapter.blocks=[]"] if isinstance(facts.recipe.student.adapter, Conv) else []
    give = ("transfer.layers=[latent]", *beside)
    saved = facts.of(TRANSFER) * facts.ladder
    why = f"{_much(facts)}; {facts.ladder:.0%} of their weights read blocks, which heads that need detail may miss"
    return Suggestion(give, facts.share_saved(saved), why)


def narrower(facts: Facts) -> Suggestion | None:
    """Projectors of half the width, where they take more than the student."""
    if not _projectors_are_much(facts) or facts.hidden < 2:
        return None
    why = f"{_much(facts)}; at most, for the loss stays"
    half = facts.hidden // 2
    return Suggestion((f"transfer.projector_width={half}",), facts.share_saved(facts.of(TRANSFER) / 2), why)


def side(facts: Facts) -> Suggestion | None:
    """An adapter beside the base, where the way back through the base is the longest part."""
    if not isinstance(facts.recipe.student.adapter, Bottleneck | Lora) or not facts.parts:
        return None
    if facts.of(BACKWARD) < max(facts.parts.values()):
        return None
    # the base is asked once, for the student and as a teacher
    saved = facts.of(BACKWARD) + min(facts.of(FORWARD), facts.of(BASE))
    why = "nothing goes back through the base then; at most, for the adapter has a step of its own"
    return Suggestion(("student.adapter={kind: side}",), facts.share_saved(saved), why)


ADVICE: tuple[Callable[[Facts], Suggestion | None], ...] = (
    accumulate,
    cache,
    bf16,
    int8,
    workers,
    reads,
    narrower,
    side,
)


def suggestions(facts: Facts) -> list[Suggestion]:
    """Those that apply: first what it does not run without, then by what they save."""
    found = [one for advise in ADVICE if (one := advise(facts)) is not None]
    worth = [one for one in found if one.saves is None or one.saves >= LEAST]
    return sorted(worth, key=lambda one: -math.inf if one.saves is None else -one.saves)


def _projectors_are_much(facts: Facts) -> bool:
    return facts.of(TRANSFER) > facts.of(FORWARD, BACKWARD)


def _much(facts: Facts) -> str:
    share, student = (seconds / facts.step for seconds in (facts.of(TRANSFER), facts.of(FORWARD, BACKWARD)))
    return f"projectors and loss take {share:.0%} of a step, the student {student:.0%}"
