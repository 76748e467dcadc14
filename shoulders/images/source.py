"""The interface of an image source, and functions that all kinds of sources use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoulders.images.decode import READS_AVIF, Undecodable

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    *((".avif",) if READS_AVIF else ()),
)
_EXTENSION_BYTES = tuple(extension.encode() for extension in EXTENSIONS)
MAX_FILE_BYTES = 2**29  # 512 MiB: a larger file has more pixels than any useful max_pixels, so it is not read


class ImageSource(Protocol):
    """Encoded images by index, each with a stable name and possibly a class.

    Attributes:
        classes: the names of the classes; None if the source has no names.
        labels: (count,) int64, -1 for an image without one; None if the source has no labels.
    """

    classes: list[str] | None
    labels: NDArray[np.int64] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image, relative to the source, so that it stays the same when the source is moved."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError or Undecodable if it cannot be read."""
        ...

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        ...


class NameList:
    """Byte strings in two flat buffers, which need little memory and are fast to pickle, even for a million paths."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.text = b"".join(names)
        lengths = np.fromiter((len(name) for name in names), dtype=np.int64, count=len(names))
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index > 0 else 0
        return self.text[start : self.ends[index]]


def check_file_size(size: int) -> None:
    """Refuse an encoded image of too many bytes.

    Raises:
        Undecodable: with the limit.
    """
    if size > MAX_FILE_BYTES:
        raise Undecodable(f"file too large: {size} bytes, at most {MAX_FILE_BYTES}")


def is_image_name(name: bytes) -> bool:
    """Whether a relative path has the extension of an image; hidden files (``._photo.jpg``) do not count."""
    last = name.rpartition(b"/")[2]
    return not last.startswith(b".") and last.lower().endswith(_EXTENSION_BYTES)


def image_id(source_name: str, name: str) -> int:
    """Stable id of an image in [0, 2**63), which depends on the names of the source and of the image alone."""
    key = f"{source_name}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def label_at(labels: NDArray[np.int64] | None, index: int) -> int | None:
    """``labels[index]``, or None if there are no labels or the image has none (-1)."""
    return None if labels is None or labels[index] < 0 else int(labels[index])
