"""What every source of images offers, and the small things that all kinds share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
)
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
MAX_BYTES = 2**29  # 512 MiB: no image within reach of max_pixels is larger, so what is larger is not read


class ImageSource(Protocol):
    """Encoded images by number, with a stable name and possibly a class each.

    Attributes:
        classes: the name of each class, or None where the source has no names.
        labels: (count,) int64, -1 where an image has none; None where the source has no labels.
    """

    classes: list[str] | None
    labels: NDArray[np.int64] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image, relative to the source, so that moving the source changes nothing."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError or Undecodable where it cannot be had."""
        ...

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        ...


class Names:
    """Byte strings in two flat buffers: a million paths stay cheap to keep, to share and to pickle."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.text = b"".join(names)
        lengths = np.fromiter((len(name) for name in names), dtype=np.int64, count=len(names))
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index > 0 else 0
        return self.text[start : self.ends[index]]


def is_image_name(name: bytes) -> bool:
    """Whether a relative path is named like an image; hidden files (``._photo.jpg``) are not."""
    last = name.rpartition(b"/")[2]
    return not last.startswith(b".") and last.lower().endswith(_ENDINGS)


def image_id(source_name: str, name: str) -> int:
    """Stable id of an image in [0, 2**63): it depends on the two names alone, not on place or order."""
    key = f"{source_name}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def label_at(labels: NDArray[np.int64] | None, index: int) -> int | None:
    """``labels[index]``, or None where there is none."""
    return None if labels is None or labels[index] < 0 else int(labels[index])
