"""A folder of image files, with any nesting."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.images.passed_over import list_names
from shoulders.images.source import NameList, check_file_size, is_image_name, label_at

HIDDEN = (b".", b"__MACOSX")  # beginnings of names that are passed over; macOS puts the latter into zip files


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
            check_file_size(size)
            return file.read()

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)

    def why_unlabelled(self) -> str:
        """What prevents the sub-folders from being the classes, where only some images do; for an error."""
        others = [name for name in map(self.names.__getitem__, range(len(self))) if name.count(b"/") != 1]
        if not 0 < len(others) < len(self):
            return ""
        return f", because {len(others)} of them are not exactly one folder down ({list_names(others, len(others))})"


@dataclass
class Listing:
    """What is below a folder; all paths are relative to it.

    Args:
        files: regular files that are not hidden.
        folders: that are not hidden, the folder itself as ``b""``.
        broken: links to nothing, pipes and devices.
        hidden: folders whose images are passed over because of their name.
    """

    files: list[bytes] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    broken: list[bytes] = field(default_factory=list)
    hidden: list[bytes] = field(default_factory=list)


def list_files(root: Path) -> Listing:
    """The files below ``root``, without hidden ones.

    Links to folders are followed, each folder is listed once: at its real path if that is below ``root``.

    Raises:
        OSError: a sub-folder cannot be listed; otherwise its images would be missing in silence.
    """
    top, listing = os.fsencode(root), Listing()
    visited: set[tuple[int, int]] = set()
    folders, links = [b""], list[bytes]()
    while folders or links:
        relative = folders.pop() if folders else links.pop()
        folder = os.path.join(top, relative)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        listing.folders.append(relative)
        for entry in _entries(folder):
            path = relative + b"/" + entry.name if relative else entry.name
            if entry.name.startswith(HIDDEN):
                if _holds_images(entry):
                    listing.hidden.append(path)
            elif entry.is_file():
                listing.files.append(path)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            else:
                listing.broken.append(path)
    return listing


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _holds_images(entry: os.DirEntry[bytes]) -> bool:
    """Whether this is a folder directly in which there are images."""
    try:
        return entry.is_dir() and any(is_image_name(inside.name) for inside in _entries(os.fsencode(entry.path)))
    except OSError:  # a hidden folder need not be readable
        return False


def _classes(names: list[bytes]) -> tuple[list[str] | None, NDArray[np.int64] | None]:
    if any(name.count(b"/") != 1 for name in names):
        return None, None
    parents = [name.partition(b"/")[0] for name in names]
    classes = sorted(set(parents))
    number = {parent: index for index, parent in enumerate(classes)}
    labels = np.fromiter((number[parent] for parent in parents), dtype=np.int64, count=len(parents))
    return [os.fsdecode(parent) for parent in classes], labels
