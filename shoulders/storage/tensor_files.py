"""Safetensors files, whose header is checked before it is parsed: a header of a million tensors takes a minute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoulders.storage.json_text import parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 8 * 2**20  # a tensor takes about 100
MAX_TENSORS = 10_000


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a file.

    Raises:
        OSError, SafetensorError: it cannot be read.
        ValueError: as `check_header`.
    """
    from safetensors.torch import load_file  # the report reads headers without torch

    check_header(path)
    return load_file(path)


def read_header(path: Path) -> dict[str, Any]:
    """{name: {"dtype", "shape", ..}} of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `check_header`, or the header is not JSON.
    """
    return dict(parse_json(check_header(path)))


def check_header(path: Path) -> bytes:
    """Refuse a file with too long a header, or too many tensors; safetensors itself checks everything else.

    Returns:
        The header.

    Raises:
        OSError: it cannot be read.
        ValueError: saying what is wrong.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path.name} is not a safetensors file, or its header is too long: {length} bytes, at most "
                f"{MAX_HEADER_BYTES}"
            )
        header = file.read(length)
    count = header.count(b"{") - 1  # a brace begins each tensor, whatever its name
    if count > MAX_TENSORS:
        raise ValueError(f"{path.name} has {count} tensors, at most {MAX_TENSORS}")
    return header
