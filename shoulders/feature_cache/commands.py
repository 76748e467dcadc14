"""The functions behind ``shoulders cache``: build a cache, list its contents, verify it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shoulders.config.recipe import Recipe, as_recipe
from shoulders.distributed.signals import catch_signals
from shoulders.errors import DataError, printable
from shoulders.feature_cache.build import DEFAULT_SETTINGS, Builder, BuildSettings
from shoulders.feature_cache.codec import Codec
from shoulders.feature_cache.estimate import NO_TEACHERS, check_space, needed_bytes
from shoulders.feature_cache.metadata import LAYOUT, MANIFEST, read_json
from shoulders.feature_cache.records import TRAILER_BYTES
from shoulders.feature_cache.shard_files import ShardFiles
from shoulders.feature_cache.spec import CacheSpec, build_command, cache_folder
from shoulders.feature_cache.teacher_store import open_codec, open_store
from shoulders.feature_cache.verify import find_faults
from shoulders.teachers import Teacher
from shoulders.training.preflight import check_writable


def build_cache(
    recipe: Recipe | Path | str,
    *,
    extra_teachers: Mapping[str, Teacher] = NO_TEACHERS,
    settings: BuildSettings = DEFAULT_SETTINGS,
) -> dict[str, Any]:
    """Precompute the features of all teachers of a recipe for all views of its images, in ``recipe.cache.path``.

    Complete shards are kept: a build that was killed continues, and loses at most the shards that it was computing.

    Args:
        recipe: a recipe, or its file.
        extra_teachers: teachers that are not in the recipe, by name.
        settings: how the work is divided.

    Returns:
        As `info_cache`, and ``seconds``.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: the folder holds a cache of something else, or a damaged one; it stays as it is.
        NumericError: the features of a teacher cannot be stored.
        SpaceError: the disk is too small, or full.
        Interrupted: after SIGTERM, SIGINT or SIGUSR1.
    """
    recipe, started = as_recipe(recipe), time.perf_counter()
    with catch_signals() as signals:
        spec = CacheSpec(recipe, extra_teachers, settings.shard_records)
        builder = Builder(spec, settings, log, signals)
        if spec.unfinished():
            check_writable("cache.path", spec.path)
            check_space(spec.path, needed_bytes(spec))
            builder.compute_shards()
            builder.write_manifests()
        builder.locks.remove_stale()
        return info_cache(recipe) | {"seconds": time.perf_counter() - started}


def verify_cache(recipe: Recipe, *, extra_teachers: Mapping[str, Teacher] = NO_TEACHERS) -> dict[str, Any]:
    """Read and verify every byte of a recipe's cache.

    Args:
        recipe: the recipe.
        extra_teachers: teachers that are not in the recipe, by name.

    Returns:
        As `info_cache`, and ``seconds``.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: naming every damaged shard and record; or the cache is of something else.
    """
    started = time.perf_counter()
    spec = CacheSpec(recipe, extra_teachers)
    faults: list[str] = []
    views = sum(map(len, spec.indices.values()))
    with tqdm(total=views, unit=" records", leave=False, disable=None) as bar:
        for name, fingerprint in spec.fingerprints.items():
            store = open_store(spec.folders[name], fingerprint, build_command(recipe), spec.indices[name])
            faults += find_faults(store, bar.update)
    if faults:
        raise DataError("\n".join(faults))
    return info_cache(recipe) | {"seconds": time.perf_counter() - started}


def info_cache(recipe: Recipe) -> dict[str, Any]:
    """List the contents of ``recipe.cache.path``, whatever recipe they were built for.

    Returns:
        path, bytes, and for each teacher: the number of views, of views without features (``undecodable`` images, or
        features that are ``not_finite``), and of shards, done and in total; whether it is finished; dtype, pool and
        pca; and for each tap and component the bytes per view and the reconstruction fvu.

    Raises:
        RecipeError: no cache.path.
        DataError: there is no cache, or it is damaged.
    """
    path = cache_folder(recipe)
    layouts = sorted(path.glob(f"*/{LAYOUT}"))
    if not layouts:
        raise DataError(f"{path}: there is no cache; build it with: {build_command(recipe)}")
    teachers = [_describe(layout.parent) for layout in layouts]
    return {"path": str(path), "bytes": sum(row["bytes"] for row in teachers), "teachers": teachers}


def _describe(folder: Path) -> dict[str, Any]:
    layout = read_json(folder / LAYOUT)
    fingerprint = layout["fingerprint"]
    codec = open_codec(folder, layout)
    shards = ShardFiles(folder, codec.payload_bytes + TRAILER_BYTES, layout["shards"])
    done = [shard for shard in shards.needed if shards.is_complete(shard)]
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    return {
        "teacher": fingerprint["teacher"],
        "folder": folder.name,
        "finished": manifest is not None and len(done) == len(shards.needed),
        **{key: manifest and sum(shard[key] for shard in manifest["shards"]) for key in ("undecodable", "not_finite")},
        "views": sum(shards.counts),
        "shards": len(shards.needed),
        "shards_done": len(done),
        "bytes": sum(shards.counts[shard] for shard in done) * shards.record_bytes,
        "bytes_per_view": shards.record_bytes,
        "dtype": fingerprint["cache.dtype"],
        "pool": fingerprint["cache.pool"],
        "pca": fingerprint["cache.pca"],
        "taps": _describe_fields(codec, layout["reconstruction_fvu"]),
    }


def _describe_fields(codec: Codec, fvu: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "tap": field.tap,
            "component": field.component,
            "tokens": field.tokens,
            "width": field.width,
            "bytes_per_view": codec.field_bytes(field),
            "reconstruction_fvu": fvu[field.name],
        }
        for field in codec.fields
    ]


def log(line: str) -> None:
    """Print a line to stderr, on the first of several ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr, flush=True)
