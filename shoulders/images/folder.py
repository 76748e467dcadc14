"""A folder of image files, with any nesting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.images.decode import Undecodable
from shoulders.images.source import MAX_FILE_BYTES, NameList, label_at


class Folder:
    """The image files below ``root``. If every image is exactly one level down, the sub-folders are the classes.

    Args:
        root: the folder.
        names: relative paths of the image files, sorted, as bytes.
    """

    def __init__(self, root: Path, names: list[bytes]) -> None:
        self.root = os.fsencode(os.path.abspath(root))
        self.names = NameList(names)
        self.classes, self.labels = _classes(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path relative to the folder, with forward slashes."""
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        """The contents of the file."""
        with open(os.path.join(self.root, self.names[index]), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise Undecodable(f"file too large: {size} bytes, at most {MAX_FILE_BYTES}")
            return file.read()

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)


def walk(root: Path) -> Iterator[bytes]:
    """Relative paths of the files below ``root``, without hidden ones.

    Links to folders are followed, each folder is listed once: at its real path if that is below ``root``.

    Raises:
        OSError: a sub-folder cannot be listed; otherwise its images would be missing in silence.
    """
    top = os.fsencode(root)
    visited: set[tuple[int, int]] = set()
    folders, links = [b""], list[bytes]()
    while folders or links:
        relative = folders.pop() if folders else links.pop()
        folder = os.path.join(top, relative)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = relative + b"/" + entry.name if relative else entry.name
            if entry.is_file():
                yield path
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)


def _classes(names: list[bytes]) -> tuple[list[str] | None, NDArray[np.int64] | None]:
    if any(name.count(b"/") != 1 for name in names):
        return None, None
    parents = [name.partition(b"/")[0] for name in names]
    classes = sorted(set(parents))
    number = {parent: index for index, parent in enumerate(classes)}
    labels = np.fromiter((number[parent] for parent in parents), dtype=np.int64, count=len(parents))
    return [os.fsdecode(parent) for parent in classes], labels
