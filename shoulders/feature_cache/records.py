"""The format of records: the encoded features of one view, and a trailer that proves to which view they belong.

The trailer consists of four little-endian uint32: 0 (features), 1 (the image could not be decoded) or 2 (the features
are not finite), the crc32 of the pixels that the teacher received, zero, and the crc32 of all bytes before. That last
checksum starts from the fingerprint, the image id and the number of the view, so that a record in the wrong position is
detected as reliably as a flipped bit.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

TRAILER_BYTES = 16
RESIDUE = 0x2144DF1C  # the crc32 of any data that ends with its own crc32
HAS_FEATURES, UNDECODABLE, NOT_FINITE = 0, 1, 2
Key = tuple[int, int]  # image id, number of the view
Bytes = NDArray[np.uint8]


def pack(
    payload: Bytes, pixel_checksums: list[int | None], keys: list[Key], salt: int, not_finite: Collection[int] = ()
) -> Bytes:
    """Add trailers to payloads (B, bytes); returns records (B, bytes + TRAILER_BYTES).

    Args:
        payload: encoded features.
        pixel_checksums: the crc32 of the pixels that the teacher received; None if the image could not be decoded.
        keys: image id and number of the view.
        salt: see `salt_of`.
        not_finite: indices of the records whose features are not finite; their payload is zero.
    """
    records = np.concatenate([payload, np.zeros((len(payload), TRAILER_BYTES), np.uint8)], axis=1)
    for row, (record, checksum, key) in enumerate(zip(records, pixel_checksums, keys, strict=True)):
        flag = UNDECODABLE if checksum is None else NOT_FINITE if row in not_finite else HAS_FEATURES
        record[-TRAILER_BYTES:-4] = np.frombuffer(struct.pack("<III", flag, checksum or 0, 0), np.uint8)
        own_checksum = zlib_ng.crc32(record[:-4].data, _start(key, salt))
        record[-4:] = np.frombuffer(struct.pack("<I", own_checksum), np.uint8)
    return records


def verify_record(record: Bytes, key: Key, salt: int) -> bool:
    """Whether a record is exactly the one that was packed for this image and view."""
    return bool(zlib_ng.crc32(record.data, _start(key, salt)) == RESIDUE)


def pixel_checksums(records: Bytes) -> list[int | None]:
    """The crc32 of the pixels of each record (B, bytes); None if the image could not be decoded."""
    flags, checksums = _trailers(records)[:, :2].T.tolist()
    return [None if flag == UNDECODABLE else checksum for flag, checksum in zip(flags, checksums, strict=True)]


def is_finite(records: Bytes) -> NDArray[np.bool_]:
    """(B,) false for the records (B, bytes) of features that are not finite."""
    return _trailers(records)[:, 0] != NOT_FINITE


def salt_of(fingerprint: Mapping[str, Any]) -> int:
    """The value from which the checksums of a cache with this fingerprint start."""
    return zlib_ng.crc32((json.dumps(fingerprint, indent=1, sort_keys=True) + "\n").encode())


def _trailers(records: Bytes) -> NDArray[np.uint32]:
    """The trailers (B, 4) of records (B, bytes)."""
    return records[:, -TRAILER_BYTES:].copy().view("<u4")


def _start(key: Key, salt: int) -> int:
    return zlib_ng.crc32(struct.pack("<qq", *key), salt)
