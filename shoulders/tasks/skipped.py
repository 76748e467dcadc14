"""Labelled images that cannot be read: how many are too many, and what the rows of a score tell of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from shoulders.config.sections import Images
from shoulders.errors import DataError
from shoulders.features import Skipped

MAX_NAMES = 3  # of each reason
# of the images of a split; a context, because probes, heads and baselines of all tasks read images
_MAX_UNREADABLE: ContextVar[float] = ContextVar("max_unreadable", default=Images.model_fields["max_unreadable"].default)


@contextmanager
def max_unreadable(fraction: float) -> Iterator[None]:
    """A context in which at most this fraction of the images of a split may be skipped."""
    token = _MAX_UNREADABLE.set(fraction)
    try:
        yield
    finally:
        _MAX_UNREADABLE.reset(token)


def check_skipped(skipped: Sequence[Skipped], total: int) -> None:
    """Refuse a split of which too many images cannot be read; its score would be that of another set.

    Raises:
        DataError: a larger fraction than `max_unreadable` of ``total`` images, with counts, names and reasons.
    """
    limit = _MAX_UNREADABLE.get()
    if len(skipped) > limit * total:
        raise DataError(
            f"{len(skipped)} of {total} labelled images cannot be read, {describe_skipped(skipped)}; at most "
            f"{limit:.3g} of them may be skipped: repair them, leave them out of the labels too, or give "
            f"--max-unreadable {math.ceil(100 * len(skipped) / total) / 100:.2g}"
        )


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """Counts by kind of reason with up to three names, such as ``2 damaged ('a.jpg', 'b.jpg')``."""
    names: dict[str, list[str]] = {}
    for image in skipped:
        names.setdefault(image.reason.partition(":")[0], []).append(repr(image.name))
    parts = [
        f"{len(named)} {kind} ({', '.join(named[:MAX_NAMES])}{', ..' if len(named) > MAX_NAMES else ''})"
        for kind, named in sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return ", ".join(parts)


def skipped_settings(skipped: Sequence[Skipped]) -> dict[str, float | int | str]:
    """The settings of a row whose test images were not all read; none where they were."""
    return {"skipped_test": len(skipped), "skipped_reasons": describe_skipped(skipped)} if skipped else {}
