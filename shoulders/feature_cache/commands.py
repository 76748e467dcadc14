"""What ``shoulders cache`` does: make a cache, say what one holds, and read every byte of it to be sure."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shoulders.config.recipe import Recipe, as_recipe
from shoulders.errors import DataError
from shoulders.feature_cache import store
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.estimate import NONE, check_room, needed_bytes
from shoulders.feature_cache.read import TeacherStore, command, folder_of, open_codec
from shoulders.feature_cache.verify import verify
from shoulders.teachers import Teacher
from shoulders.training.preflight import check_writable


def build_cache(recipe: Recipe | Path | str, *, extra_teachers: Mapping[str, Teacher] = NONE) -> dict[str, Any]:
    """Store what the teachers of a recipe say of every view of its images in ``recipe.cache.path``.

    What is there already is kept; a build that was killed goes on, and losing at most the shard that it was at.

    Args:
        recipe: a recipe, or its file.
        extra_teachers: teachers beside those of the recipe, by name.

    Returns:
        As `info_cache`, and ``seconds``.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: the folder holds a cache of something else, or a damaged one; it is left as it is.
        NumericError: a teacher says something that cannot be stored.
        SpaceError: the disk cannot hold it, or is full.
    """
    recipe, started = as_recipe(recipe), time.perf_counter()
    builder = Builder(recipe, extra_teachers, say)
    if builder.unfinished():
        check_writable("cache.path", builder.path)
        check_room(builder.path, needed_bytes(builder))
        builder.work()
        builder.finish()
    builder.claims.remove_stale()
    return info_cache(recipe) | {"seconds": time.perf_counter() - started}


def verify_cache(recipe: Recipe, *, extra_teachers: Mapping[str, Teacher] = NONE) -> dict[str, Any]:
    """Read every byte of a recipe's cache.

    Returns:
        As `info_cache`, and ``seconds``.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: naming every shard and record that is not as it was written; or it is of something else.
    """
    started = time.perf_counter()
    builder = Builder(recipe, extra_teachers, say)
    faults: list[str] = []
    views = sum(map(len, builder.indices.values()))
    with tqdm(total=views, unit=" records", leave=False, disable=None) as bar:
        for name, fields in builder.prints.items():
            shelf = TeacherStore(builder.folders[name], fields, command(recipe), builder.indices[name])
            faults += verify(shelf, bar.update)
    if faults:
        raise DataError("\n".join(faults))
    return info_cache(recipe) | {"seconds": time.perf_counter() - started}


def info_cache(recipe: Recipe) -> dict[str, Any]:
    """What lies in ``recipe.cache.path``, whatever it was made for.

    Returns:
        path, bytes, and for each teacher: views, those whose image could not be decoded, the shards there and in all,
        whether it is finished, dtype, pool, pca, and for each tap and part the bytes per view and the fvu that storing
        costs.

    Raises:
        RecipeError: no cache.path.
        DataError: nothing is there, or it is damaged.
    """
    path = folder_of(recipe)
    plans = sorted(path.glob(f"*/{store.PLAN}"))
    if not plans:
        raise DataError(f"{path}: no cache is here; make it with: {command(recipe)}")
    teachers = [_describe(plan.parent) for plan in plans]
    return {"path": str(path), "bytes": sum(row["bytes"] for row in teachers), "teachers": teachers}


def _describe(folder: Path) -> dict[str, Any]:
    plan = store.read_json(folder / store.PLAN)
    made_for = plan["fingerprint"]
    codec = open_codec(folder, plan)
    shards = store.Shards(folder, codec.bytes + store.TRAILER, plan["shards"])
    there = [shard for shard in shards.needed if shards.has(shard)]
    manifest = store.read_json(folder / store.MANIFEST) if (folder / store.MANIFEST).exists() else None
    return {
        "teacher": made_for["teacher"],
        "folder": folder.name,
        "finished": manifest is not None and len(there) == len(shards.needed),
        "undecodable": None if manifest is None else sum(shard["absent"] for shard in manifest["shards"]),
        "views": sum(shards.counts),
        "shards": len(shards.needed),
        "shards_done": len(there),
        "bytes": sum(shards.counts[shard] for shard in there) * shards.record,
        "bytes_per_view": shards.record,
        "dtype": made_for["cache.dtype"],
        "pool": made_for["cache.pool"],
        "pca": made_for["cache.pca"],
        "taps": [
            {
                "tap": piece.tap,
                "part": piece.part,
                "tokens": piece.tokens,
                "width": piece.width,
                "bytes_per_view": codec.size_of(piece),
                "reconstruction_fvu": plan["lost"][f"{piece.tap}/{piece.part}"],
            }
            for piece in codec.pieces
        ],
    }


def say(line: str) -> None:
    """A line for the person who watches; of several ranks the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
