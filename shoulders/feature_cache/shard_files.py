"""Shards: files of records of one size. A shard gets its name only when it is complete and synced to disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError
from shoulders.feature_cache.metadata import SHARD
from shoulders.feature_cache.records import Bytes
from shoulders.storage.atomic import space_error, sync

MAX_OPEN_FILES = 256  # a process may usually open 1,024


def write_shard(path: Path, parts: Iterable[Bytes], needed_bytes: int) -> None:
    """Write a shard under another name, sync it, and rename it.

    Args:
        path: of the shard, which the process has locked.
        parts: records (B, bytes), in order.
        needed_bytes: of the whole shard, for the error message.

    Raises:
        SpaceError: the disk is full; the incomplete file is removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for part in parts:
                _write(descriptor, np.ascontiguousarray(part).data.cast("B"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(partial, path)
        sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            fix = f"{needed_bytes / 2**20:.1f} MiB needed; make room and run it again"
            raise space_error(error, path, fix) from error
        raise


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class ShardFiles:
    """Reads records by position with ``preadv``: a memory map would grow the process and crash on a truncated file.

    Args:
        folder: of one teacher.
        record_bytes: size of a record with its trailer.
        counts: number of records in each shard.
        max_open: number of files to keep open.
    """

    def __init__(self, folder: Path, record_bytes: int, counts: list[int], max_open: int = MAX_OPEN_FILES) -> None:
        self.folder, self.record_bytes, self.counts, self.max_open = folder, record_bytes, counts, max_open
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # number of the first record of each shard
        self._open: dict[int, int] = {}

    @property
    def needed(self) -> list[int]:
        """The shards with at least one record; the others have no file."""
        return [shard for shard, count in enumerate(self.counts) if count]

    def path(self, shard: int) -> Path:
        """Path of a shard, which may not exist yet."""
        return self.folder / SHARD.format(shard)

    def locate(self, numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shard, and position in it, of each record (B,)."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        return list(zip(shards.tolist(), (numbers - self.starts[shards]).tolist(), strict=True))

    def is_complete(self, shard: int) -> bool:
        """Whether the file of a shard exists at its full size; a shard without records needs no file."""
        if not self.counts[shard]:
            return True
        try:
            return os.stat(self.path(shard)).st_size == self.counts[shard] * self.record_bytes
        except FileNotFoundError:
            return False

    def read(self, shard: int, position: int, out: Bytes) -> None:
        """Read one record into ``out`` (record_bytes,).

        Raises:
            DataError: the file does not exist, or ends too early.
        """
        try:
            length = os.preadv(self._descriptor(shard), [out.data], position * self.record_bytes)
        except OSError as error:
            raise DataError(f"{self.path(shard)}: cannot be read ({error.strerror})") from error
        if length != self.record_bytes:
            raise DataError(f"{self.path(shard)}: ends within record {position}; remove the file and build it again")

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            while len(self._open) >= self.max_open:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
