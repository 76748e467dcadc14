"""Tar files in the WebDataset layout (key.jpg with key.cls or key.json), read in place and never extracted."""

from __future__ import annotations

import json
import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shoulders.errors import DataError
from shoulders.images.passed_over import PassedOver, list_names
from shoulders.images.source import NameList, check_file_size, is_image_name, label_at

MAX_LABEL_BYTES = 2**16  # a larger .cls or .json file is not read
Label = tuple[bytes, int]  # name of the member that holds it, and the label


class TarShards:
    """The images in one or more uncompressed tar files, read at byte offsets.

    The members of one sample have the same key, which is their name up to the first dot after the last slash, as in
    WebDataset. A label belongs to the one image with its key. Members that are neither used nor text are counted in a
    warning, as are labels that are no class numbers.

    Args:
        paths: of the tar files.
        names: the name of each tar file in the names of its images.

    Raises:
        DataError: a tar file that is damaged, incomplete or compressed, or a label whose sample has two images or
            another label.
    """

    classes: list[str] | None = None  # .cls files hold numbers, not names

    def __init__(self, paths: list[Path], names: list[bytes]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        members: list[bytes] = []
        offsets: list[tuple[int, int, int]] = []
        labels: list[int] = []
        passed_over, invalid = PassedOver(), list[bytes]()
        for shard, path in enumerate(self.paths):
            for member, offset, size, label in _list_images(path, passed_over, invalid):
                members.append(names[shard] + b"/" + member)
                offsets.append((shard, offset, size))
                labels.append(label)
        self.names = NameList(members)
        self.offsets = np.array(offsets, dtype=np.int64).reshape(-1, 3)  # (count, 3): shard, offset and size in bytes
        self.labels = np.array(labels, dtype=np.int64) if any(label >= 0 for label in labels) else None
        self._warn(passed_over, invalid)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Name of the tar file and of the image in it."""
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        """The encoded image."""
        shard, offset, size = self.offsets[index].tolist()
        check_file_size(size)
        # the file is opened for each read: forked workers share no descriptor, and any number of shards is possible
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)

    def _warn(self, passed_over: PassedOver, invalid: list[bytes]) -> None:
        """Warn of members that are not used, and of labels that cannot be used."""
        several = f"{len(self.paths)} tar files in {os.path.dirname(self.paths[0])}"
        which = self.paths[0] if len(self.paths) == 1 else several
        if len(self) and passed_over:
            used = f"{len(self)} images are used; passed over are"
            warnings.warn(f"{which}: {used} {passed_over.describe()}", stacklevel=3)
        if invalid:
            names = list_names(invalid, len(invalid))
            warnings.warn(
                f"{which}: labels that are no class numbers: {len(invalid)} ({names}); their images have no label: "
                "write numbers from 0",
                stacklevel=3,
            )


def _list_images(path: str, passed_over: PassedOver, invalid: list[bytes]) -> list[tuple[bytes, int, int, int]]:
    """(name, offset, size, label or -1) of each image in one tar file.

    Args:
        passed_over: members that are neither images nor labels are added to it.
        invalid: names of members with an invalid label are added to it.
    """
    images: list[tuple[bytes, int, int]] = []
    labels: dict[bytes, Label] = {}
    with open(path, "rb") as file:
        for name, member in _members(path, file):
            # links and sparse files have no contents of their own in the archive
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                passed_over.add_named("links or devices", [name])
            elif is_image_name(name):
                images.append((name, member.offset_data, member.size))
            elif name.lower().endswith((b".cls", b".json")):
                text = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES + 1), member.offset_data)
                _add_label(path, name, text, labels, invalid)
            else:
                passed_over.add(name)
    _check_samples(path, [name for name, *_ in images], labels)
    return [(name, offset, size, labels.get(_sample_key(name), (b"", -1))[1]) for name, offset, size in images]


def _members(path: str, file: BinaryIO) -> Iterator[tuple[bytes, tarfile.TarInfo]]:
    """The members of a tar file but folders, and their names.

    Raises:
        DataError: it is damaged, incomplete or compressed.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            total = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                if member.type == tarfile.DIRTYPE:
                    continue
                if member.isreg() and member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"a member of {member.size} bytes goes past the end")
                yield os.fsencode(member.name).removeprefix(b"./"), member
            # tarfile stops in silence at a damaged header, and at the end of the first of several archives
            if (offset := _first_nonzero(file, tar.offset)) is not None:
                raise tarfile.ReadError(f"damaged header, or another archive behind the first, at byte {offset}")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        # tarfile calls itself for each header that only describes the next one
        reason = "too many chained headers" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: not a complete, uncompressed tar file ({reason}); write it again") from error


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


def _add_label(path: str, name: bytes, text: bytes, labels: dict[bytes, Label], invalid: list[bytes]) -> None:
    """Add the label of a member, if it holds one, to those of its tar file.

    Raises:
        DataError: the sample has another label already.
    """
    try:
        label = _parse_label(name, text)
    except (ValueError, RecursionError):
        invalid.append(name)
        return
    if label is None:
        return
    other, value = labels.setdefault(_sample_key(name), (name, label))
    if value != label:
        key = os.fsdecode(_sample_key(name))
        raise DataError(
            f"{path}: the sample {key!r} has two labels, {value} in {os.fsdecode(other)!r} and {label} in "
            f"{os.fsdecode(name)!r}; a sample is what has the same name up to the first dot: rename one of them"
        )


def _check_samples(path: str, images: list[bytes], labels: dict[bytes, Label]) -> None:
    """Refuse a label whose sample has two images: it is unclear of which.

    Raises:
        DataError: naming the first two.
    """
    first: dict[bytes, bytes] = {}
    for name in images:
        key = _sample_key(name)
        if key in labels and key in first:
            raise DataError(
                f"{path}: the sample {os.fsdecode(key)!r} has two images, {os.fsdecode(first[key])!r} and "
                f"{os.fsdecode(name)!r}, and the label in {os.fsdecode(labels[key][0])!r}; a sample is what has the "
                "same name up to the first dot: rename them"
            )
        first[key] = name


def _parse_label(name: bytes, text: bytes) -> int | None:
    """The label in a .cls file (a number) or a .json file (its ``label``); None: a .json file without a label.

    Raises:
        ValueError: another value, or too long a file.
        RecursionError: JSON that is nested too deeply.
    """
    if len(text) > MAX_LABEL_BYTES:
        raise ValueError("too long")
    if name.lower().endswith(b".cls"):
        if not text.strip().isdigit():
            raise ValueError("not a number")
        label: Any = int(text)
    else:
        content = json.loads(text)
        label = content.get("label") if isinstance(content, dict) else None
        if label is None:
            return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if type(label) is not int or not 0 <= label < 2**31:  # True is an int too
        raise ValueError("not a class number")
    return label
