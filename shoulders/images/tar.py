"""Tar files in the WebDataset layout (key.jpg with key.cls or key.json), read in place and never extracted."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shoulders.errors import DataError
from shoulders.images.decode import Undecodable
from shoulders.images.source import MAX_FILE_BYTES, NameList, is_image_name, label_at

MAX_LABEL_BYTES = 2**16  # a larger .cls or .json file is not read


class TarShards:
    """The images in one or more uncompressed tar files, read at byte offsets.

    Args:
        paths: of the tar files.
        names: the name of each tar file in the names of its images.

    Raises:
        DataError: a tar file that is damaged, incomplete or compressed.
    """

    classes: list[str] | None = None  # .cls files hold numbers, not names

    def __init__(self, paths: list[Path], names: list[bytes]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        members: list[bytes] = []
        offsets: list[tuple[int, int, int]] = []
        labels: list[int] = []
        for shard, path in enumerate(self.paths):
            for member, offset, size, label in _list_images(path):
                members.append(names[shard] + b"/" + member)
                offsets.append((shard, offset, size))
                labels.append(label)
        self.names = NameList(members)
        self.offsets = np.array(offsets, dtype=np.int64).reshape(-1, 3)  # (count, 3): shard, offset and size in bytes
        self.labels = np.array(labels, dtype=np.int64) if any(label >= 0 for label in labels) else None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Name of the tar file and of the image in it."""
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        """The encoded image."""
        shard, offset, size = self.offsets[index].tolist()
        if size > MAX_FILE_BYTES:
            raise Undecodable(f"file too large: {size} bytes, at most {MAX_FILE_BYTES}")
        # the file is opened for each read: forked workers share no descriptor, and any number of shards is possible
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)


def _list_images(path: str) -> list[tuple[bytes, int, int, int]]:
    """(name, offset, size, label or -1) of each image in one tar file."""
    images: list[tuple[bytes, int, int]] = []
    labels: dict[bytes, int] = {}
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                # links, devices and sparse files have no contents of their own in the archive
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"a member of {member.size} bytes goes past the end")
                name = os.fsencode(member.name).removeprefix(b"./")
                if is_image_name(name):
                    images.append((name, member.offset_data, member.size))
                elif name.endswith((b".cls", b".json")) and member.size <= MAX_LABEL_BYTES:
                    text = os.pread(file.fileno(), member.size, member.offset_data)
                    if (label := _parse_label(name, text)) is not None:
                        labels[_sample_key(name)] = label
            # tarfile stops in silence at a damaged header, and at the end of the first of several archives
            if (offset := _first_nonzero(file, tar.offset)) is not None:
                raise tarfile.ReadError(f"damaged header, or another archive behind the first, at byte {offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a complete, uncompressed tar file ({error}); write it again") from error
    return [(name, offset, size, labels.get(_sample_key(name), -1)) for name, offset, size in images]


def _first_nonzero(file: BinaryIO, start: int) -> int | None:
    """Offset of the first byte after ``start`` that is not zero; a tar file may end with any number of zeros."""
    file.seek(start)
    while part := file.read(2**20):
        if rest := part.lstrip(b"\0"):
            return file.tell() - len(rest)
    return None


def _sample_key(name: bytes) -> bytes:
    """The part of the name that all members of one sample have in common: up to the first dot of the file name."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _parse_label(name: bytes, text: bytes) -> int | None:
    """The label in a .cls file (a number) or a .json file (its ``label``), or None where there is no valid one."""
    try:
        value = int(text) if name.endswith(b".cls") else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, int) and 0 <= value < 2**31 else None
