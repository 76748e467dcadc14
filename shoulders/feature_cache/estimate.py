"""What a cache will take, before it is made: disk, minutes, memory; and the refusal where the disk cannot hold it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError, SpaceError
from shoulders.feature_cache import store
from shoulders.feature_cache.ask import TeacherRunner
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.codec import Codec
from shoulders.features import Batch
from shoulders.storage.atomic import free_bytes, size_text
from shoulders.teachers import Teacher
from shoulders.training.preflight import check_writable

NONE: Mapping[str, Teacher] = {}
TIMED = 16  # views that each teacher is timed on
DRAWN = 5  # times as many are drawn, to time that: the first ones wait for the loader's workers to come up


def estimate_cache(recipe: Recipe, *, extra_teachers: Mapping[str, Teacher] = NONE) -> dict[str, Any]:
    """What making the cache of a recipe will take, from asking each teacher about a few images.

    Returns:
        path, ``disk_bytes`` (of what is still to be made), ``free_bytes``, ``memory_bytes``, ``minutes``, and for each
        teacher that is not finished its views, and its bytes and seconds per view.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: the folder holds a cache of something else.
        SpaceError: the disk cannot hold it.
    """
    builder = Builder(recipe, extra_teachers, lambda line: None)
    check_writable("cache.path", builder.path)
    left = {name: builder.missing(name) for name in builder.unfinished()}
    batch, seconds_to_draw = _draw(builder)
    teachers, needed, seconds = [], 0, seconds_to_draw * builder.to_draw(list(left))
    for name, views in left.items():
        asking = builder.load(name)
        size, seconds_to_ask = _record_bytes(asking, recipe), _time(asking, batch)
        teachers.append({"teacher": name, "views": views, "bytes_per_view": size, "s_per_view": seconds_to_ask})
        needed, seconds = needed + views * size, seconds + views * seconds_to_ask
    check_room(builder.path, needed)
    return {
        "path": str(builder.path),
        "disk_bytes": needed,
        "free_bytes": free_bytes(builder.path),
        "memory_bytes": _peak_bytes() + _block_bytes(builder),
        "minutes": seconds / 60,
        "teachers": teachers,
    }


def needed_bytes(builder: Builder) -> int:
    """Bytes of all shards that are still to be written; a teacher without a plan is loaded to know its widths."""
    needed = 0
    for name in builder.unfinished():
        views = builder.missing(name)
        if (builder.folders[name] / store.PLAN).exists():
            record = builder.shelf(name).shards.record
        else:
            record = _record_bytes(builder.load(name), builder.recipe)
        needed += record * views
    return needed


def check_room(path: Path, needed: int) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        SpaceError: naming the path, what is needed and what is free.
    """
    free = free_bytes(path)
    if needed > free:
        raise SpaceError(
            f"{path}: {size_text(needed)} needed, {size_text(free)} free; make room, give another cache.path, or take "
            "cache.dtype=int8, cache.pool=2 or fewer images.views"
        )


def _record_bytes(asking: TeacherRunner, recipe: Recipe) -> int:
    return Codec(asking.taps, recipe.cache).bytes + store.TRAILER


def _draw(builder: Builder) -> tuple[Batch, float]:
    """A few views of different images, and the seconds that drawing one takes."""
    last = builder.index.first_heldout - 1
    numbers = np.linspace(0, last, min(DRAWN * TIMED, last + 1)).astype(np.int64)
    parts = [numbers[start::DRAWN] for start in range(min(DRAWN, len(numbers)))]
    clock = [time.perf_counter()]
    batches = []
    for batch in builder.draw(builder.index, parts):
        batches.append(batch)
        clock.append(time.perf_counter())
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        raise DataError(f"none of {len(numbers)} images could be decoded, such as {batches[0].skipped[0].name!r}")
    warm = 1 if len(parts) > 1 else 0
    return first, (clock[-1] - clock[warm]) / sum(map(len, parts[warm:]))


def _time(asking: TeacherRunner, batch: Batch) -> float:
    """Seconds per view; the first answer, which sets things up, does not count."""
    few = batch.split(max(1, min(asking.at_once, TIMED)))[0]
    asking(few)
    start = time.perf_counter()
    asking(few)
    if asking.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(few)


def _block_bytes(builder: Builder) -> int:
    """Decoded pixels that wait in memory for the next teacher."""
    return builder.block_views() * sum(3 * h * w for h, w in builder.sizes)


def _peak_bytes() -> int:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
