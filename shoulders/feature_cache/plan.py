"""What is settled before the first shard: how records are laid out, and what storing costs in accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shoulders.config.sections import Cache
from shoulders.errors import DataError
from shoulders.feature_cache import store
from shoulders.feature_cache.ask import TeacherRunner, refusal, together
from shoulders.feature_cache.channels import ChannelTransform, fit_channels, save_channels
from shoulders.feature_cache.codec import Codec, EncodeError, errors
from shoulders.feature_cache.fingerprint import Fields
from shoulders.features import Batch, Features
from shoulders.storage.atomic import write_bytes
from shoulders.transfer.standardize import Moments

FITTED, FITTED_FOR_PCA = 128, 1024  # views that the statistics of channels are taken of
MEASURED = 128  # other views that the cost of storing is measured on
FEWEST = 16
TOLERABLE = 1e-3  # fvu: a part of which int8 loses more has its channels made equally loud first


def write_plan(
    folder: Path,
    asking: TeacherRunner,
    draw: Callable[[int, int], Iterator[Batch]],
    records: int,
    counts: list[int],
    fingerprint: Fields,
    cache: Cache,
) -> dict[str, Any]:
    """Settle how a teacher is stored, and write ``plan.json`` and what belongs to it.

    Args:
        draw: first and end of a range of records -> batches of their views.
        records: training views; those that are measured come first.
        counts: records of each shard.

    Returns:
        The plan.

    Raises:
        DataError: not one image could be decoded.
        NumericError: the teacher says something that cannot be stored.
    """
    measured = min(MEASURED, max(records // 4, min(records, FEWEST)))
    said = [asking(batch) for batch in draw(0, measured) if len(batch)]
    if not said:
        raise DataError(
            f"{asking.name}: none of the first {measured} views of its images could be decoded; check that the "
            "path of its images leads to whole image files"
        )
    told = {tap: together([one[tap] for one in said]) for tap in asking.taps}
    plain = _lost(asking.name, Codec(asking.taps, cache.model_copy(update={"pca": None})), told)
    loud = {part for part, lost in plain.items() if cache.dtype == "int8" and lost > TOLERABLE}
    channels: dict[str, ChannelTransform] = {}
    if loud or cache.pca:
        first = measured if records >= 2 * measured else 0  # not those that are measured, where there are others
        fitted = min(FITTED_FOR_PCA if cache.pca else FITTED, records - first)
        channels = _fit(asking, draw(first, first + fitted), cache, loud)
    codec = Codec(asking.taps, cache, channels)
    folder.mkdir(parents=True, exist_ok=True)
    data = save_channels(channels)
    if channels:
        write_bytes(folder / store.CHANNELS, data)
    plan = {
        "fingerprint": fingerprint,
        "taps": [[tap, [facts.summary, facts.spatial, *facts.grid]] for tap, facts in asking.taps.items()],
        "layout": codec.to_json(),
        "shards": counts,
        "channels": hashlib.sha256(data).hexdigest() if channels else None,
        "lost": _lost(asking.name, codec, told),
        "measured": measured,
    }
    store.write_json(folder / store.PLAN, plan)
    return plan


def _lost(name: str, codec: Codec, told: dict[str, Features]) -> dict[str, float]:
    try:
        return errors(codec, told)
    except EncodeError as error:
        raise refusal(name, error) from error


def _fit(asking: TeacherRunner, batches: Iterator[Batch], cache: Cache, loud: set[str]) -> dict[str, ChannelTransform]:
    """What is done to the channels of each part."""
    pooling = Codec(asking.taps, cache)
    moments: dict[str, Moments] = {}
    for batch in batches:
        if not len(batch):
            continue
        for tap, features in pooling.pooled(asking(batch)).items():
            for part, x in features.components().items():
                moments.setdefault(f"{tap}/{part}", Moments(x.shape[-1])).update(x)
    fitted = {}
    for name, found in moments.items():
        reduced = cache.pca is not None and len(found.mean) > cache.pca
        fitted[name] = fit_channels(found, cache.pca, name in loud or (reduced and cache.dtype == "int8"))
    return {name: channels for name, channels in fitted.items() if channels}
