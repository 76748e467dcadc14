"""The cached features of one teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoulders.config.sections import Cache
from shoulders.errors import DataError
from shoulders.feature_cache.channels import load_channels
from shoulders.feature_cache.codec import Codec
from shoulders.feature_cache.fingerprint import Fingerprint, Size, differences
from shoulders.feature_cache.index import Numbers, RecordIndex
from shoulders.feature_cache.metadata import CHANNELS, LAYOUT, MANIFEST, read_json
from shoulders.feature_cache.records import TRAILER_BYTES, is_finite, pixel_checksums, salt_of, verify_record
from shoulders.feature_cache.shard_files import MAX_OPEN_FILES, ShardFiles
from shoulders.features import Features
from shoulders.teachers import Tap

CHUNK_BYTES = 2**20  # read, verified and decoded at a time on a CPU: about the size of its cache


class TeacherStore:
    """Reads the records of one teacher and decodes them.

    Args:
        index: of the records.
        codec: of the records.
        shards: the files.
        salt: of the checksums, see `salt_of`.
        size: (h, w) in px of the images that the teacher received.
        command: that builds the cache, for error messages.
        verify: whether to check each record that is read against its checksum.
    """

    def __init__(
        self,
        index: RecordIndex,
        codec: Codec,
        shards: ShardFiles,
        salt: int,
        size: Size,
        command: str,
        verify: bool = True,
    ) -> None:
        self.index, self.codec, self.shards, self.salt = index, codec, shards, salt
        self.size, self.command, self.verify = size, command, verify
        self.folder = shards.folder

    def features(
        self, numbers: Numbers, device: torch.device
    ) -> tuple[dict[str, Features], list[int | None], NDArray[np.bool_]]:
        """``{tap: Features}`` of records (B,) on ``device``, and two properties of each record.

        Returns:
            features: zero where they are not finite.
            checksums: the crc32 of the pixels.
            finite: (B,) whether the features are finite.

        Raises:
            DataError: as `records`.
        """
        step = len(numbers) if device.type == "cuda" else max(1, CHUNK_BYTES // self.shards.record_bytes)
        checksums: list[int | None] = []
        finite = np.ones(len(numbers), np.bool_)

        def chunks() -> Iterator[Tensor]:
            for start in range(0, len(numbers), step):
                records = self.records(numbers[start : start + step])
                checksums.extend(pixel_checksums(records.numpy()))
                finite[start : start + step] = is_finite(records.numpy())
                yield records.to(device, non_blocking=True)

        return self.codec.decode_parts(chunks(), len(numbers)), checksums, finite

    def records(self, numbers: Numbers, allow_undecodable: bool = False) -> Tensor:
        """Read records (B, record_bytes) uint8.

        Args:
            numbers: (B,).
            allow_undecodable: also return records of images that could not be decoded, which hold no features.

        Raises:
            DataError: a record is damaged or missing, or its image could not be decoded.
        """
        shape = (len(numbers), self.shards.record_bytes)
        if torch.cuda.is_available():
            records = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            records = torch.from_numpy(np.empty(shape, np.uint8))  # in huge pages
        keys = self.index.keys(numbers)
        for record, key, (shard, position) in zip(records.numpy(), keys, self.shards.locate(numbers), strict=True):
            self.shards.read(shard, position, record)
            if self.verify and not verify_record(record, key, self.salt):
                path = self.shards.path(shard)
                raise DataError(f"{path}: record {position} is damaged; remove this file, then: {self.command}")
        if not allow_undecodable and None in (checksums := pixel_checksums(records.numpy())):
            name = self.index.images.collection.name_of_id(keys[checksums.index(None)][0])
            raise DataError(
                f"{name!r} could not be decoded when {self.folder} was built; remove {self.folder.parent}, then: "
                f"{self.command}"
            )
        return records


def open_store(
    folder: Path,
    fingerprint: Fingerprint,
    command: str,
    index: RecordIndex,
    complete: bool = True,
    max_open: int = MAX_OPEN_FILES,
) -> TeacherStore:
    """Open the cached features of a teacher.

    Args:
        folder: of the teacher.
        fingerprint: of the features that are needed.
        command: that builds the cache, for error messages.
        index: of the records.
        complete: refuse an incomplete store; otherwise its complete shards can be read.
        max_open: number of files to keep open.

    Raises:
        DataError: the store does not exist, is incomplete or damaged, or has another fingerprint.
    """
    if not (folder / LAYOUT).exists():
        raise DataError(f"{folder}: there is no cache of this teacher; build it with: {command}")
    layout = read_json(folder / LAYOUT)
    check_fingerprint(folder, layout.get("fingerprint", {}), fingerprint)
    codec = open_codec(folder, layout)
    shards = ShardFiles(folder, codec.payload_bytes + TRAILER_BYTES, layout["shards"], max_open)
    if complete:
        _check_complete(shards, command)
    height, width = fingerprint["size"]
    return TeacherStore(index, codec, shards, salt_of(fingerprint), (height, width), command)


def check_fingerprint(folder: Path, old: Fingerprint, new: Fingerprint) -> None:
    """Refuse a store with another fingerprint.

    Args:
        folder: of the store.
        old: the fingerprint of the store.
        new: the fingerprint that is needed.

    Raises:
        DataError: naming every field that differs.
    """
    different = differences(old, new)
    if different:
        raise DataError(
            f"{folder}: built for something else: {'; '.join(different)}; build another one with: shoulders cache "
            f"RECIPE cache.path=OTHER, or remove {folder} first"
        )


def open_codec(folder: Path, layout: Mapping[str, Any]) -> Codec:
    """The codec of a store, with the transforms of its channels.

    Args:
        folder: of the store.
        layout: contents of its ``layout.json``.

    Raises:
        DataError: the file of the transforms is damaged.
    """
    fingerprint = layout["fingerprint"]
    settings = Cache(dtype=fingerprint["cache.dtype"], pool=fingerprint["cache.pool"], pca=fingerprint["cache.pca"])
    taps = {tap: Tap(shape[0], shape[1], (shape[2], shape[3])) for tap, shape in layout["taps"]}
    if layout["channels"] is None:
        return Codec(taps, settings)
    path = folder / CHANNELS
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != layout["channels"]:
        raise DataError(f"{path}: missing or damaged; remove {folder} and build it again")
    return Codec(taps, settings, load_channels(path, data))


def _check_complete(shards: ShardFiles, command: str) -> None:
    folder = shards.folder
    if not (folder / MANIFEST).exists():
        done = sum(map(shards.is_complete, shards.needed))
        raise DataError(f"{folder}: {done} of {len(shards.needed)} shards are complete; finish it with: {command}")
    read_json(folder / MANIFEST)
    for shard in shards.needed:
        if not shards.is_complete(shard):
            raise DataError(f"{shards.path(shard)}: missing, or of another size; build it again: {command}")
