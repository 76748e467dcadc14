"""Labelled images that cannot be read: how many are too many, and what the rows of a score tell of them."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.errors import DataError
from shoulders.features import Skipped

MAX_SKIPPED = 0.25  # fraction of the images of a split
MAX_NAMES = 3  # of each reason


def check_skipped(skipped: Sequence[Skipped], total: int) -> None:
    """Refuse a split of which too many images cannot be read; its score would be that of another set.

    Raises:
        DataError: more than `MAX_SKIPPED` of ``total`` images, with counts, names and reasons.
    """
    if len(skipped) > MAX_SKIPPED * total:
        raise DataError(
            f"{len(skipped)} of {total} labelled images cannot be read, {describe_skipped(skipped)}; at most "
            f"{MAX_SKIPPED:.0%} may be skipped: repair them, or leave them out of the labels too"
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
