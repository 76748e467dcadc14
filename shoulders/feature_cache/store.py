"""Records on disk: flat shards with a checksum in every record, read by position, and a manifest over all of them.

A teacher's folder holds ``plan.json`` (written first: the fingerprint and how records are laid out), where channels are
changed ``channels.safetensors``, ``shard-00000.bin`` .. and ``manifest.json`` (written last: what every other file is).
A shard has its name only when it is whole: it is written aside, synced and renamed.

A record is its payload, a flag (0: there, 1: the image could not be decoded), the crc32 of the pixels that the teacher
saw, and a crc32 over all of that which starts from the fingerprint, the image and the view: a record in another's place
is found as surely as a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from shoulders.errors import DataError
from shoulders.storage.atomic import space_error, sync, write_text

PLAN, MANIFEST, CHANNELS = "plan.json", "manifest.json", "channels.safetensors"
SHARD = "shard-{:05d}.bin"
TRAILER = 16  # bytes: flag, crc32 of the pixels, zero, crc32; little-endian uint32 each
RESIDUE = 0x2144DF1C  # the crc32 of whatever ends with its own
THERE, ABSENT = 0, 1
Key = tuple[int, int]  # image id and view
Bytes = NDArray[np.uint8]


def seal(payload: Bytes, seen: list[int | None], keys: list[Key], salt: int) -> Bytes:
    """Records (B, bytes + TRAILER) of payloads (B, bytes).

    Args:
        seen: the crc32 of the pixels that the teacher saw; None where the image could not be decoded.
        keys: image and view.
        salt: see `salt_of`.
    """
    records = np.concatenate([payload, np.zeros((len(payload), TRAILER), np.uint8)], axis=1)
    for record, pixels, key in zip(records, seen, keys, strict=True):
        flag = ABSENT if pixels is None else THERE
        record[-TRAILER:-4] = np.frombuffer(struct.pack("<III", flag, pixels or 0, 0), np.uint8)
        record[-4:] = np.frombuffer(struct.pack("<I", _checksum(record, key, salt)), np.uint8)
    return records


def is_sound(record: Bytes, key: Key, salt: int) -> bool:
    """Whether a record is the one of this image and view, bit for bit."""
    return bool(zlib_ng.crc32(record.data, _start(key, salt)) == RESIDUE)


def pixels_seen(records: Bytes) -> list[int | None]:
    """The crc32 of the pixels that the teacher saw, of each record (B, bytes); None where there was no image."""
    trailers = records[:, -TRAILER:].copy().view("<u4").tolist()  # (B, 4)
    return [pixels if flag == THERE else None for flag, pixels, *_ in trailers]


def salt_of(fingerprint: dict[str, Any]) -> int:
    """Where the checksums of a cache with this fingerprint start."""
    return zlib_ng.crc32(_dump(fingerprint).encode())


def _checksum(record: Bytes, key: Key, salt: int) -> int:
    return zlib_ng.crc32(record[:-4].data, _start(key, salt))


def _start(key: Key, salt: int) -> int:
    return zlib_ng.crc32(struct.pack("<qq", *key), salt)


def write_shard(path: Path, parts: Iterable[Bytes], needed: int) -> None:
    """Write a shard aside, sync it, and give it its name: never half there.

    Args:
        parts: records (B, bytes), in order.
        needed: bytes of the whole shard, for the message.

    Raises:
        SpaceError: if the disk is full; nothing is left behind.
    """
    aside = path.with_name(path.name + ".partial")  # whoever writes a shard has claimed it
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for part in parts:
                _write(descriptor, np.ascontiguousarray(part).data.cast("B"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(aside, path)
        sync(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise space_error(error, path, f"{needed / 2**20:.1f} MiB needed; make room and run it again") from error
        raise


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class Shards:
    """Finished shards, read by position with ``preadv``: a memory map grows the process and dies of a short file.

    Args:
        folder: of one teacher.
        record: bytes of a record with its trailer.
        counts: records in each shard.

    Attributes:
        most: files that are held open; shards that are read side by side share `MOST_OPEN`.
    """

    def __init__(self, folder: Path, record: int, counts: list[int]) -> None:
        self.folder, self.record, self.counts = folder, record, counts
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.most = MOST_OPEN
        self._open: dict[int, int] = {}

    @property
    def needed(self) -> list[int]:
        """The shards that hold anything."""
        return [shard for shard, count in enumerate(self.counts) if count]

    def path(self, shard: int) -> Path:
        """Where a shard lies or will lie."""
        return self.folder / SHARD.format(shard)

    def where(self, numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shard and row of each record (B,)."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        return list(zip(shards.tolist(), (numbers - self.starts[shards]).tolist(), strict=True))

    def has(self, shard: int) -> bool:
        """Whether a shard is there, at its full size; one of no records needs no file."""
        if not self.counts[shard]:
            return True
        try:
            return os.stat(self.path(shard)).st_size == self.counts[shard] * self.record
        except FileNotFoundError:
            return False

    def read(self, shard: int, row: int, into: Bytes) -> None:
        """Read one record (record,).

        Raises:
            DataError: its shard is not there, or ends too early.
        """
        try:
            got = os.preadv(self._descriptor(shard), [into.data], row * self.record)
        except OSError as error:
            raise DataError(f"{self.path(shard)}: cannot be read ({error.strerror})") from error
        if got != self.record:
            raise DataError(f"{self.path(shard)}: ends within record {row}; remove the file and make it anew")

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            while len(self._open) >= self.most:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


MOST_OPEN = 256  # files that shards hold open: a process may have 1,024


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file that says its own sha256.

    Raises:
        SpaceError: if the disk is full.
    """
    write_text(path, _dump(tree | {"sha256": _sha256_of(tree)}))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        DataError: a single bit is not as it was written.
    """
    try:
        text = path.read_bytes()
        tree = json.loads(text)
        said = tree.pop("sha256")
        if said != _sha256_of(tree) or text != _dump(tree | {"sha256": said}).encode():
            raise ValueError("not the bytes that were written")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: damaged ({why}); remove {path.parent} and make it anew") from error
    return tree


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def _sha256_of(tree: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(tree).encode()).hexdigest()
