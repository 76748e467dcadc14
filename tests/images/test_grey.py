"""Grey values of more than 8 bits keep their levels: one range for all images of a source, and a word about it."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shoulders.images import Collection, open_source
from shoulders.images.grey import MAX_SAMPLES
from tests.images.test_decode import encode, png_chunk

RAMP = np.tile(np.arange(256, dtype=np.int64), (16, 1))
Pixels = NDArray[np.generic]


def collection(folder: Path, images: list[bytes]) -> Collection:
    folder.mkdir()
    for number, data in enumerate(images):
        (folder / f"{number}.{'png' if data[1:4] == b'PNG' else 'tif'}").write_bytes(data)
    return Collection({"scans": open_source(folder)})


def tiff(values: Pixels) -> bytes:
    return encode(Image.fromarray(values), "TIFF")


def decoded(images: Collection) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [images.pixels(index, 10**6, None)[0][0] for index in range(len(images))]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (RAMP.astype(np.int32), "integer values, 0 is black, 255 white"),
        ((RAMP * 4).astype(np.uint16), "integer values, 0 is black, 1023 white"),
        ((RAMP * 16).astype(np.uint16), "integer values, 0 is black, 4095 white"),
        ((RAMP * 257).astype(np.uint16), "integer values, 0 is black, 65535 white"),
        ((RAMP * 8 - 1000).astype(np.int32), "integer values, -1000 is black, 1040 white"),
        ((RAMP / 255).astype(np.float32), "float values, 0 is black, 1 white"),
        ((RAMP * 16).astype(np.float32), "float values, 0 is black, 4080 white"),
        ((0.25 + RAMP / 255).astype(np.float32), r"float values, 0\.25 is black, 1\.25 white"),
    ],
)
def test_the_range_of_a_source_keeps_all_levels_and_is_printed(tmp_path: Path, values: Pixels, line: str) -> None:
    images = collection(tmp_path / "scans", [tiff(values), tiff(values)])
    with pytest.warns(UserWarning, match=rf"0\.tif and others: grey {line} \(2 of 2 images\)") as caught:
        pixels = [images.pixels(index, 10**6, None)[0] for index in (0, 1)]
    assert len(caught) == 1
    assert all(len(one.unique()) >= 250 for one in pixels)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((RAMP / 255).astype(np.float32), np.where(RAMP == 255, 1.2, RAMP / 255).astype(np.float32)),
        ((RAMP * 16).astype(np.uint16), (RAMP * 257).astype(np.uint16) // 257 * 16 + (RAMP == 255) * 50_000),
        (RAMP.astype(np.int32), np.where(RAMP == 0, -1, RAMP).astype(np.int32)),
    ],
)
def test_the_same_value_is_the_same_grey_in_all_images_of_a_source(
    tmp_path: Path, first: Pixels, second: Pixels
) -> None:
    one, other = decoded(collection(tmp_path / "scans", [tiff(first), tiff(second.astype(first.dtype))]))
    assert one[0, 128] == other[0, 128]


def deep_colours(values: Pixels, opaque: bool = False) -> bytes:
    """A PNG of three channels of 16 bits, or of grey and alpha."""
    height, width = values.shape
    bands = [values, np.full_like(values, 65535)] if opaque else 3 * [values]
    rows = np.stack(bands, 2).astype(">u2")
    header = struct.pack(">IIBBBBB", width, height, 16, 4 if opaque else 2, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    )


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (deep_colours(RAMP * 16), "0.png: its values, of 16 bits the upper 8, use under a tenth"),
        (deep_colours(RAMP * 16, opaque=True), "0.png: its values, of 16 bits the upper 8, use under a tenth"),
        (tiff(np.where(RAMP == 255, 10**9, RAMP).astype(np.int32)), "0.tif: its values use under a tenth"),
        (encode(Image.fromarray(np.full((8, 8), 30_000, np.uint16)), "PNG"), "0.png: its values use under a tenth"),
    ],
)
def test_an_image_that_hardly_uses_its_range_is_named_once(tmp_path: Path, image: bytes, name: str) -> None:
    images = collection(tmp_path / "scans", [image, image])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 1):
            images.pixels(index, 10**6, None)
    assert [str(one.message).startswith(name) for one in caught].count(True) == 1


def test_images_beyond_the_range_of_the_samples_are_counted(tmp_path: Path) -> None:
    usual, bright = tiff((RAMP * 4).astype(np.uint16)), tiff((RAMP * 40).astype(np.uint16))
    sampled = {*np.linspace(0, 199, MAX_SAMPLES).astype(int).tolist()}
    others = [number for number in range(200) if number not in sampled][:12]
    names = [f"{number:03}" for number in range(200)]
    (tmp_path / "scans").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "scans" / f"{name}.tif").write_bytes(bright if number in others else usual)
    images = Collection({"scans": open_source(tmp_path / "scans")})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (*others, *others):  # an image is counted once
            images.pixels(index, 10**6, None)
    fault = "values outside of the range from 0 to 1023 are clipped"
    assert [str(one.message) for one in caught][1:] == [
        f"{names[others[0]]}.tif: {fault} (further images are counted)",
        f"{names[others[9]]}.tif: {fault} (10 images so far)",
    ]


def test_photos_of_8_bits_are_decoded_without_a_word(tmp_path: Path) -> None:
    images = collection(tmp_path / "scans", [encode(Image.new("RGB", (8, 8), (7, 8, 9)), "PNG")])
    assert images.pixels(0, 100, None)[0][:, 0, 0].tolist() == [7, 8, 9]
    assert images.grey_ranges["scans"].ranges is None
