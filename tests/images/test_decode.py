"""Unusual image files are decoded to the right pixels, or refused with the reason."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from shoulders.images.decode import Undecodable, decode, decode_with_size

PHOTOS = Path(os.environ.get("SHOULDERS_DATA", Path(__file__).parents[2] / "../shared/data")) / "photos"
MAX_PIXELS = 1_000_000


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quadrants(width: int = 40, height: int = 24) -> Image.Image:
    """Red, green / blue, white: every orientation looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255, 0, 0
    pixels[: height // 2, width // 2 :] = 0, 255, 0
    pixels[height // 2 :, : width // 2] = 0, 0, 255
    pixels[height // 2 :, width // 2 :] = 255, 255, 255
    return Image.fromarray(pixels)


def corners(pixels: Tensor) -> str:
    """The colours of the four quarters, row by row."""
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W", (0, 0, 0): "K"}
    _, h, w = pixels.shape
    spots = [pixels[:, y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]
    return "".join(names.get(tuple((spot > 127).int().tolist()), "?") for spot in spots)


def check(pixels: Tensor) -> None:
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, "RGBW"), (2, "GRWB"), (3, "WBGR"), (4, "BWRG"), (5, "RBGW"), (6, "BRWG"), (7, "WGBR"), (8, "GWRB")],
)
def test_exif_orientation(kind: str, orientation: int, expected: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, size = decode_with_size(encode(quadrants(), kind, exif=exif), MAX_PIXELS)
    assert corners(pixels) == expected
    assert tuple(pixels.shape[1:]) == size == ((40, 24) if orientation >= 5 else (24, 40))
    stored, size = decode_with_size(encode(quadrants(), kind, exif=exif), MAX_PIXELS, upright=False)
    assert (corners(stored), tuple(stored.shape[1:]), size) == ("RGBW", (24, 40), (24, 40))


def test_the_full_size_is_right_with_an_orientation_and_a_reduced_scale() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, size = decode_with_size(encode(quadrants(800, 600), "JPEG", exif=exif), MAX_PIXELS, min_side=100)
    assert (corners(pixels), size, tuple(pixels.shape)) == ("BRWG", (800, 600), (3, 200, 150))
    photo = encode(quadrants(800, 600), "JPEG", exif=exif)
    pixels, size = decode_with_size(photo, MAX_PIXELS, min_side=100, upright=False)
    assert (corners(pixels), size, tuple(pixels.shape)) == ("RGBW", (600, 800), (3, 150, 200))


@pytest.mark.parametrize(("min_side", "height"), [(None, 600), (601, 600), (300, 300), (299, 300), (75, 75), (1, 75)])
def test_a_reduced_scale_keeps_the_smallest_side(min_side: int | None, height: int) -> None:
    assert decode(encode(quadrants(800, 600), "JPEG"), MAX_PIXELS, min_side).shape[1] == height
    assert decode(encode(quadrants(800, 600), "PNG"), MAX_PIXELS, min_side).shape[1] == 600


def half_transparent() -> Image.Image:
    """Opaque red on the left; on the right transparent, with black hidden under it."""
    image = Image.new("RGBA", (40, 24), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (20, 0, 40, 24))
    return image


def transparent_palette() -> bytes:
    image = Image.new("P", (40, 24), 0)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(1, (20, 0, 40, 24))
    return encode(image, "PNG", transparency=1)


def transparent_grey() -> bytes:
    image = Image.new("LA", (40, 24), (0, 255))
    image.paste((0, 0), (20, 0, 40, 24))
    return encode(image, "PNG")


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def several_frames(kind: str) -> bytes:
    later = [Image.new("RGB", (40, 24), "blue")]
    return encode(quadrants(), kind, save_all=True, append_images=later)


EXPECTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg": (lambda: encode(quadrants(), "JPEG"), "RGBW"),
    "progressive jpeg": (lambda: encode(quadrants(), "JPEG", progressive=True), "RGBW"),
    "cmyk jpeg, inverted as Adobe does": (lambda: encode(quadrants().convert("CMYK"), "JPEG"), "RGBW"),
    "cmyk tiff": (lambda: encode(quadrants().convert("CMYK"), "TIFF"), "RGBW"),
    "ycbcr tiff": (lambda: encode(quadrants().convert("YCbCr"), "TIFF"), "RGBW"),
    "mpo of a phone": (lambda: several_frames("MPO"), "RGBW"),
    "jpeg with a colour profile": (lambda: encode(quadrants(), "JPEG", icc_profile=srgb_profile()), "RGBW"),
    "png": (lambda: encode(quadrants(), "PNG"), "RGBW"),
    "png with a colour profile": (lambda: encode(quadrants(), "PNG", icc_profile=srgb_profile()), "RGBW"),
    "bmp": (lambda: encode(quadrants(), "BMP"), "RGBW"),
    "ppm": (lambda: encode(quadrants(), "PPM"), "RGBW"),
    "webp": (lambda: encode(quadrants(), "WEBP", lossless=True), "RGBW"),
    "palette": (lambda: encode(quadrants().quantize(4), "PNG"), "RGBW"),
    "palette with transparency": (transparent_palette, "RWRW"),
    "rgba": (lambda: encode(half_transparent(), "PNG"), "RWRW"),
    "rgba webp": (lambda: encode(half_transparent(), "WEBP", lossless=True), "RWRW"),
    "rgb with a transparent colour": (lambda: encode(quadrants(), "PNG", transparency=(255, 0, 0)), "WGBW"),
    "grey with alpha": (transparent_grey, "KWKW"),
    "grey": (lambda: encode(quadrants().convert("L").point(lambda v: 255 * (v > 100)), "PNG"), "KWKW"),
    "one bit": (
        lambda: encode(quadrants().convert("L").point(lambda v: 255 * (v > 100)).convert("1"), "PNG"),
        "KWKW",
    ),
    "one bit tiff": (lambda: encode(quadrants().convert("L").point(lambda v: v > 100, "1"), "TIFF"), "KWKW"),
    "gif": (lambda: encode(quadrants(), "GIF"), "RGBW"),
    "animated gif": (lambda: several_frames("GIF"), "RGBW"),
    "animated webp": (lambda: several_frames("WEBP"), "RGBW"),
    "animated png": (lambda: several_frames("PNG"), "RGBW"),
    "tiff of several pages": (lambda: several_frames("TIFF"), "RGBW"),
    "broken exif": (lambda: encode(quadrants(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "RGBW"),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_unusual_images_are_decoded_correctly(case: str) -> None:
    make, expected = EXPECTED[case]
    pixels = decode(make(), MAX_PIXELS)
    check(pixels)
    assert tuple(pixels.shape) == (3, 24, 40)
    assert corners(pixels) == expected


def ramp(kind: str) -> bytes:
    values = np.tile(np.linspace(0, 65535, 1024), (4, 1))
    if kind == "float png-like tiff":
        return encode(Image.fromarray((values / 65535).astype(np.float32)), "TIFF")
    if kind == "float tiff in counts":
        return encode(Image.fromarray((values - 30000).astype(np.float32)), "TIFF")
    if kind == "32-bit tiff":
        return encode(Image.fromarray(values.astype(np.int32)), "TIFF")
    if kind == "big-endian tiff":
        return encode(Image.fromarray(values.astype(">u2")), "TIFF")
    return encode(Image.fromarray(values.astype(np.uint16)), kind)


@pytest.mark.parametrize(
    "kind",
    ["PNG", "TIFF", "PPM", "32-bit tiff", "big-endian tiff", "float png-like tiff", "float tiff in counts"],
)
def test_grey_images_of_more_than_8_bits_keep_their_levels(kind: str) -> None:
    pixels = decode(ramp(kind), MAX_PIXELS)
    check(pixels)
    assert len(pixels.unique()) >= 250
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 0, -1] == 255
    assert (pixels[0, 0].int().diff() >= 0).all()


def test_a_dark_16_bit_grey_image_stays_dark() -> None:
    image = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    assert decode(encode(image, "PNG"), MAX_PIXELS).unique().tolist() == [4]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))


def deep_rgb_png() -> bytes:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 0, 32768) * 4 for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_sixteen_bit_rgb_png() -> None:
    assert decode(deep_rgb_png(), MAX_PIXELS)[:, 0, 0].tolist() == [255, 0, 128]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 2)])
def test_thin_and_tiny_images(size: tuple[int, int]) -> None:
    assert tuple(decode(encode(Image.new("RGB", size), "PNG"), MAX_PIXELS, min_side=224).shape) == (
        3,
        size[1],
        size[0],
    )


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "empty file"),
    "one byte": (lambda: b"\xff", "not an image"),
    "text": (lambda: b"this is not a photo" * 50, "not an image"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "not an image"),
    "pdf": (lambda: b"%PDF-1.7\n", "not an image"),
    "eps": (lambda: encode(quadrants(), "EPS"), "not an image"),
    "ico": (lambda: encode(quadrants(), "ICO"), "not an image"),
    "truncated jpeg": (lambda: encode(quadrants(400, 300), "JPEG")[:2000], "damaged"),
    "truncated png": (lambda: encode(quadrants(400, 300), "PNG")[:300], "damaged"),
    "truncated webp": (lambda: encode(quadrants(400, 300), "WEBP")[:200], ""),
    "truncated gif": (lambda: encode(quadrants(400, 300), "GIF")[:900], "damaged"),
    "truncated tiff": (lambda: encode(quadrants(400, 300), "TIFF")[:3000], ""),
    "huge png within Pillow's limit": (lambda: huge_png(9000, 9000), "too many pixels"),
    "huge png beyond Pillow's limit": (lambda: huge_png(60000, 60000), "too many pixels"),
    "float tiff of nan": (
        lambda: encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        "damaged: no finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_complete_images_are_refused_with_the_reason(case: str) -> None:
    make, reason = REFUSED[case]
    data = make()
    started = time.perf_counter()
    with pytest.raises(Undecodable) as refusal:
        decode(data, MAX_PIXELS)
    assert str(refusal.value).startswith(reason)
    assert "\n" not in str(refusal.value) and "0x" not in str(refusal.value)
    assert time.perf_counter() - started < 1


def test_max_pixels_is_inclusive() -> None:
    data = encode(quadrants(100, 100), "PNG")
    decode(data, 10_000)
    with pytest.raises(Undecodable, match="100 x 100, at most 9999"):
        decode(data, 9_999)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs real photos (set SHOULDERS_DATA)")
def test_real_photos_are_decoded_as_by_pillow() -> None:
    for path in sorted(PHOTOS.glob("*.jpg"))[::20]:
        expected = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(decode(path.read_bytes(), 10_000_000).permute(1, 2, 0).numpy(), expected)


def test_threads_that_decode_at_once_leave_the_warning_filters_as_they_were() -> None:
    first_is_inside, first_may_end, first_has_ended = (threading.Event() for _ in range(3))
    data = encode(Image.fromarray(np.full((4, 4), 1000, np.uint16)), "PNG")

    def range_in_first(values: object, kind: str) -> tuple[float, float]:
        first_is_inside.set()
        first_may_end.wait(30)
        return 0, 65535

    def range_in_second(values: object, kind: str) -> tuple[float, float]:
        first_may_end.set()
        first_has_ended.wait(30)
        return 0, 65535

    def decode_first() -> None:
        decode_with_size(data, MAX_PIXELS, choose_range=range_in_first)
        first_has_ended.set()

    filters = list(warnings.filters)
    thread = threading.Thread(target=decode_first)
    thread.start()
    first_is_inside.wait(30)
    decode_with_size(data, MAX_PIXELS, choose_range=range_in_second)
    thread.join()
    assert warnings.filters == filters


def test_warnings_of_pillow_are_ignored_and_others_are_not() -> None:
    code = (
        "import sys, warnings\nfrom shoulders.images.decode import decode\n"
        "decode(sys.stdin.buffer.read(), 10**6)\nwarnings.warn('of our own')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=EXPECTED["broken exif"][0](), capture_output=True, check=True
    )
    assert [line for line in done.stderr.decode().splitlines() if "Warning" in line] == [
        "<string>:4: UserWarning: of our own"
    ]
