"""Estimate of the disk space, time and memory of building a cache, and the refusal if the disk is too small."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoulders.config.recipe import Recipe
from shoulders.distributed.device import peak_main_memory
from shoulders.errors import DataError, SpaceError
from shoulders.feature_cache.build import DEFAULT_SETTINGS, Builder, BuildSettings
from shoulders.feature_cache.codec import Codec
from shoulders.feature_cache.records import TRAILER_BYTES
from shoulders.feature_cache.spec import CacheSpec
from shoulders.feature_cache.teacher_runner import TeacherRunner
from shoulders.features import Batch
from shoulders.storage.atomic import free_bytes, size_text
from shoulders.teachers import Teacher
from shoulders.training.preflight import check_writable

NO_TEACHERS: Mapping[str, Teacher] = {}
TIMED_VIEWS = 16  # on which each teacher is timed
DRAWN_BATCHES = 5  # of as many views, to time the drawing; the first batch waits until the workers have started


def estimate_cache(
    recipe: Recipe,
    *,
    extra_teachers: Mapping[str, Teacher] = NO_TEACHERS,
    settings: BuildSettings = DEFAULT_SETTINGS,
) -> dict[str, Any]:
    """Estimate the cost of building the cache of a recipe: each teacher runs on a few images.

    Args:
        recipe: with a cache.path and a number of views.
        extra_teachers: teachers that are not in the recipe, by name.
        settings: how the work is divided.

    Returns:
        path, ``disk_bytes`` (of the missing shards), ``free_bytes``, ``memory_bytes``, ``minutes``, and for each
        unfinished teacher the number of missing views, and bytes and seconds per view.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: the folder holds a cache of something else.
        SpaceError: the disk is too small.
    """
    spec = CacheSpec(recipe, extra_teachers, settings.shard_records)
    builder = Builder(spec, settings, lambda line: None)
    check_writable("cache.path", spec.path)
    missing = {name: spec.missing_records(name) for name in spec.unfinished()}
    batch, draw_s = _time_drawing(spec)
    teachers, disk_bytes, seconds = [], 0, draw_s * builder.views_to_draw(missing)
    for name, views in missing.items():
        runner = spec.load_runner(name)
        size, teacher_s = _record_bytes(runner, recipe), _time_teacher(runner, batch)
        teachers.append({"teacher": name, "views": views, "bytes_per_view": size, "s_per_view": teacher_s})
        disk_bytes, seconds = disk_bytes + views * size, seconds + views * teacher_s
    check_space(spec.path, disk_bytes)
    return {
        "path": str(spec.path),
        "disk_bytes": disk_bytes,
        "free_bytes": free_bytes(spec.path),
        "memory_bytes": peak_main_memory() + _pixel_bytes(builder),
        "minutes": seconds / 60,
        "teachers": teachers,
    }


def needed_bytes(spec: CacheSpec) -> int:
    """Bytes of all missing shards; a teacher without a layout is loaded, which gives its shapes."""
    needed = 0
    for name in spec.unfinished():
        if spec.has_layout(name):
            record_bytes = spec.store(name).shards.record_bytes
        else:
            record_bytes = _record_bytes(spec.load_runner(name), spec.recipe)
        needed += record_bytes * spec.missing_records(name)
    return needed


def check_space(path: Path, needed: int) -> None:
    """Refuse a cache that does not fit on the disk.

    Args:
        path: of the cache.
        needed: bytes.

    Raises:
        SpaceError: naming the path, the needed and the free space.
    """
    free = free_bytes(path)
    if needed > free:
        raise SpaceError(
            f"{path}: {size_text(needed)} needed, {size_text(free)} free; make room, give another cache.path, or set "
            "cache.dtype=int8, cache.pool=2 or fewer images.views"
        )


def _record_bytes(runner: TeacherRunner, recipe: Recipe) -> int:
    return Codec(runner.taps, recipe.cache).payload_bytes + TRAILER_BYTES


def _time_drawing(spec: CacheSpec) -> tuple[Batch, float]:
    """A few views of different images, and the seconds of drawing one view."""
    last = spec.index.first_heldout - 1
    numbers = np.linspace(0, last, min(DRAWN_BATCHES * TIMED_VIEWS, last + 1)).astype(np.int64)
    parts = [numbers[start::DRAWN_BATCHES] for start in range(min(DRAWN_BATCHES, len(numbers)))]
    times = [time.perf_counter()]
    batches = []
    for batch in spec.draw(spec.index, parts):
        batches.append(batch)
        times.append(time.perf_counter())
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        raise DataError(f"none of {len(numbers)} images could be decoded, such as {batches[0].skipped[0].name!r}")
    warm_up = 1 if len(parts) > 1 else 0
    return first, (times[-1] - times[warm_up]) / sum(map(len, parts[warm_up:]))


def _time_teacher(runner: TeacherRunner, batch: Batch) -> float:
    """Seconds per view, after one call for warm-up."""
    part = batch.split(max(1, min(runner.max_batch, TIMED_VIEWS)))[0]
    runner(part)
    start = time.perf_counter()
    runner(part)
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(part)


def _pixel_bytes(builder: Builder) -> int:
    """Bytes of the pixels that are in memory at a time."""
    return builder.block_views() * sum(3 * h * w for h, w in builder.spec.sizes)
