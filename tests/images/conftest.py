"""Small images in a folder or a tar file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def make_jpeg(number: int, size: tuple[int, int] = (48, 36)) -> bytes:
    """A smooth colour image of (width, height), different for each number."""
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    return make_jpeg


@pytest.fixture
def tar() -> Callable[[Path, dict[str, bytes]], None]:
    return write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 40 files, of which 07.jpg and 21.jpg cannot be decoded."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(40):
        data = make_jpeg(number)
        if number == 7:
            data = b"<html>not found</html>"
        if number == 21:
            data = data[: len(data) // 2]
        (root / f"{number:02}.jpg").write_bytes(data)
    return root
