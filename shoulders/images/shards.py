"""Tar files in the WebDataset layout (key.jpg, key.cls or key.json), read in place and never extracted."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shoulders.errors import DataError
from shoulders.images.decode import Undecodable
from shoulders.images.source import MAX_BYTES, Names, is_image_name, label_at

_MAX_LABEL_BYTES = 2**16


class Shards:
    """Image members of one or more uncompressed tar files, found by an index of offsets.

    Args:
        paths: where the tar files are.
        names: what each is called in the names of its images.

    Raises:
        DataError: for a tar file that is damaged, cut short or compressed.
    """

    classes: list[str] | None = None  # .cls files hold numbers, not names

    def __init__(self, paths: list[Path], names: list[bytes]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        members: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        for shard, path in enumerate(self.paths):
            for member, offset, size, label in _index(path):
                members.append(names[shard] + b"/" + member)
                places.append((shard, offset, size))
                labels.append(label)
        self.names = Names(members)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)  # (count, 3): shard, offset, size
        self.labels = np.array(labels, dtype=np.int64) if any(label >= 0 for label in labels) else None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Shard and member name."""
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        shard, offset, size = self.places[index].tolist()
        if size > MAX_BYTES:
            raise Undecodable(f"file too large: {size} bytes, at most {MAX_BYTES}")
        # opened for each read: nothing to share over a fork, and ten thousand shards stay below the limit
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)


def _index(path: str) -> list[tuple[bytes, int, int, int]]:
    """(name, offset, size, label or -1) of each image in one tar file."""
    images: list[tuple[bytes, int, int]] = []
    labels: dict[bytes, int] = {}
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header it has seen
                # links, devices and sparse files have no plain bytes of their own in the archive
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"a member of {member.size} bytes goes past the end")
                name = os.fsencode(member.name).removeprefix(b"./")
                if is_image_name(name):
                    images.append((name, member.offset_data, member.size))
                elif name.endswith((b".cls", b".json")) and member.size <= _MAX_LABEL_BYTES:
                    text = os.pread(file.fileno(), member.size, member.offset_data)
                    _note_label(labels, name, text)
            # tarfile takes a damaged header in the middle for the end, and stops at the first end of several
            if (after := _something_after(file, tar.offset)) is not None:
                raise tarfile.ReadError(f"damaged header, or another archive behind the first, at byte {after}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole, uncompressed tar file ({error}); write it again") from error
    return [(name, offset, size, labels.get(_key(name), -1)) for name, offset, size in images]


def _something_after(file: BinaryIO, start: int) -> int | None:
    """Where the first block after ``start`` is that is not of zeros, which may fill a file up."""
    file.seek(start)
    while part := file.read(2**20):
        if left := part.lstrip(b"\0"):
            return file.tell() - len(left)
    return None


def _key(name: bytes) -> bytes:
    """What the members of one sample share: everything up to the first dot of the last part."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _note_label(labels: dict[bytes, int], name: bytes, text: bytes) -> None:
    """Keep the label in a .cls (a number) or a .json (its ``label``); anything else is no label."""
    try:
        value = int(text) if name.endswith(b".cls") else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(value, int) and 0 <= value < 2**31:
        labels[_key(name)] = value
