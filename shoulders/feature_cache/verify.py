"""Reading every byte of a cache: when it is complete, and whenever the user wants to check it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.errors import DataError
from shoulders.feature_cache.metadata import LAYOUT, MANIFEST, read_json, write_json
from shoulders.feature_cache.records import is_finite, pixel_checksums
from shoulders.feature_cache.teacher_store import TeacherStore

CHUNK_BYTES = 2**24  # read at a time


def write_manifest(store: TeacherStore, on_records: Callable[[int], object]) -> None:
    """Verify all records of a teacher and write the manifest, which makes its cache complete.

    Args:
        store: of the teacher.
        on_records: called with the number of records that were verified since the last call.

    Raises:
        DataError: a shard is damaged.
        SpaceError: the disk is full.
    """
    shards = []
    for shard, count in enumerate(store.shards.counts):
        shards.append({"bytes": count * store.shards.record_bytes} | check_shard(store, shard))
        on_records(count)
    write_json(store.folder / MANIFEST, {"layout": _sha256(store.folder / LAYOUT), "shards": shards})


def find_faults(store: TeacherStore, on_records: Callable[[int], object]) -> list[str]:
    """Verify a complete store against its manifest; returns a line for each damaged file.

    Args:
        store: of the teacher.
        on_records: as in `write_manifest`.
    """
    faults = []
    manifest = read_json(store.folder / MANIFEST)
    if manifest["layout"] != _sha256(store.folder / LAYOUT):
        faults.append(f"{store.folder / LAYOUT}: not the file that belongs to the manifest")
    for shard, entry in enumerate(manifest["shards"]):
        try:
            if not check_shard(store, shard).items() <= entry.items():
                faults.append(f"{store.shards.path(shard)}: not the bytes that were written")
        except DataError as error:
            faults.append(str(error))
        on_records(store.shards.counts[shard])
    return faults


def check_shard(store: TeacherStore, shard: int) -> dict[str, Any]:
    """Read a shard; returns its ``sha256``, and the number of its records without features, by reason.

    Raises:
        DataError: naming the first damaged record.
    """
    digest, undecodable, not_finite = hashlib.sha256(), 0, 0
    first, end = int(store.shards.starts[shard]), int(store.shards.starts[shard + 1])
    step = max(1, CHUNK_BYTES // store.shards.record_bytes)
    for start in range(first, end, step):
        numbers = np.arange(start, min(start + step, end))
        records = store.records(numbers, allow_undecodable=True).numpy()
        digest.update(records.data)
        undecodable += pixel_checksums(records).count(None)
        not_finite += int((~is_finite(records)).sum())
    return {"sha256": digest.hexdigest(), "undecodable": undecodable, "not_finite": not_finite}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
