"""Reading every byte of a cache: when it is finished, and whenever someone wants to be sure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shoulders.errors import DataError
from shoulders.feature_cache import store
from shoulders.feature_cache.read import TeacherStore

AT_ONCE = 2**24  # bytes


def finish(shelf: TeacherStore, on_records: Callable[[int], object]) -> None:
    """Read back what was written and write the manifest: from now on the teacher's cache is whole.

    Raises:
        DataError: a shard is damaged; the message says what to do.
        SpaceError: if the disk is full.
    """
    shards = []
    for shard in range(len(shelf.shards.counts)):
        absent, sha256 = check_shard(shelf, shard)
        shards.append({"bytes": shelf.shards.counts[shard] * shelf.shards.record, "sha256": sha256, "absent": absent})
        on_records(shelf.shards.counts[shard])
    manifest = {"plan": _sha256(shelf.folder / store.PLAN), "shards": shards}
    store.write_json(shelf.folder / store.MANIFEST, manifest)


def verify(shelf: TeacherStore, on_records: Callable[[int], object]) -> list[str]:
    """Everything that is wrong with a teacher's cache; nothing where all is as it was written."""
    faults = []
    if shelf.manifest["plan"] != _sha256(shelf.folder / store.PLAN):
        faults.append(f"{shelf.folder / store.PLAN}: not the one that the manifest is about")
    for shard, said in enumerate(shelf.manifest["shards"]):
        try:
            absent, sha256 = check_shard(shelf, shard)
            if (sha256, absent) != (said["sha256"], said["absent"]):
                faults.append(f"{shelf.shards.path(shard)}: not the bytes that were written")
        except DataError as error:
            faults.append(str(error))
        on_records(shelf.shards.counts[shard])
    return faults


def check_shard(shelf: TeacherStore, shard: int) -> tuple[int, str]:
    """How many of a shard's images could not be decoded, and its sha256.

    Raises:
        DataError: naming the first damaged record.
    """
    shards, digest, absent = shelf.shards, hashlib.sha256(), 0
    first, end = int(shards.starts[shard]), int(shards.starts[shard + 1])
    step = max(1, AT_ONCE // shards.record)
    for start in range(first, end, step):
        numbers = np.arange(start, min(start + step, end))
        records = shelf.records(numbers, absent_too=True).numpy()
        digest.update(records.data)
        absent += store.pixels_seen(records).count(None)
    return absent, digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
