"""A folder of image files, of any nesting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.images.decode import Undecodable
from shoulders.images.source import MAX_BYTES, Names, label_at


class Folder:
    """Image files below ``root``; classes are the sub-folders where every image lies exactly one level down.

    Args:
        root: the folder.
        names: relative paths of the image files, sorted, as bytes.
    """

    def __init__(self, root: Path, names: list[bytes]) -> None:
        self.root = os.fsencode(os.path.abspath(root))
        self.names = Names(names)
        self.classes, self.labels = _classes(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path relative to the folder, with forward slashes."""
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        with open(os.path.join(self.root, self.names[index]), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise Undecodable(f"file too large: {size} bytes, at most {MAX_BYTES}")
            return file.read()

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)


def walk(root: Path) -> Iterator[bytes]:
    """Relative paths of the files below ``root``, without hidden ones; links are followed, loops are not.

    A folder that is there and linked to as well is listed where it is.

    Raises:
        OSError: for a sub-folder that cannot be listed, so that none is lost in silence.
    """
    top = os.fsencode(root)
    seen: set[tuple[int, int]] = set()
    todo, links = [b""], list[bytes]()
    while todo or links:
        relative = todo.pop() if todo else links.pop()
        folder = os.path.join(top, relative)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        for entry in inside:
            if entry.name.startswith(b"."):
                continue
            path = relative + b"/" + entry.name if relative else entry.name
            if entry.is_file():
                yield path
            elif entry.is_dir():
                (links if entry.is_symlink() else todo).append(path)


def _classes(names: list[bytes]) -> tuple[list[str] | None, NDArray[np.int64] | None]:
    if any(name.count(b"/") != 1 for name in names):
        return None, None
    parents = [name.partition(b"/")[0] for name in names]
    classes = sorted(set(parents))
    number = {parent: index for index, parent in enumerate(classes)}
    labels = np.fromiter((number[parent] for parent in parents), dtype=np.int64, count=len(parents))
    return [os.fsdecode(parent) for parent in classes], labels
