"""Decoding: the bytes of an image file to pixels, or to the reason why it cannot be used."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, features
from torch import Tensor

from shoulders.errors import DataError

MAX_PIXELS = 50_000_000  # of an image, by default; larger ones are not decoded
# the formats that Pillow may try: EPS would start Ghostscript, and decoders of rare formats have more faults
READS_AVIF = "avif" in features.modules and features.check("avif")  # depends on how Pillow was built
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if READS_AVIF else ()))
# of odd metadata; what is wrong with an image itself is raised. Not by catch_warnings: threads that decode at the same
# time would restore each other's filters
warnings.filterwarnings("ignore", module=r"PIL\.")
GreyRange = tuple[float, float]  # the grey values that become 0 and 255
ChooseRange = Callable[[NDArray[np.generic], str], GreyRange]
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> (whether to swap rows and columns first, axes of (H, W) to reverse then)
_ORIENTATIONS = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


class Undecodable(DataError):
    """An image that cannot be used; the message is ``kind: details``, so that kinds can be counted."""


def decode(data: bytes, max_pixels: int, min_side: int | None = None) -> Tensor:
    """Pixels (3, H, W) uint8 of an encoded image, upright; the first frame where there are several.

    Transparent parts become white: photos of single objects are usually shown on white, also in training data.
    Colour profiles are ignored, as is common in the field.

    Args:
        data: the file.
        max_pixels: images of more pixels are refused; read from the header, before any pixel is decoded.
        min_side: JPEG files are decoded at a reduced scale at which both sides keep this many pixels; None: full size.

    Raises:
        Undecodable: the data is not a complete image of a known format.
    """
    return decode_with_size(data, max_pixels, min_side)[0]


def decode_with_size(
    data: bytes,
    max_pixels: int,
    min_side: int | None = None,
    upright: bool = True,
    choose_range: ChooseRange | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Like `decode`, and also the size (H, W) of the image at full scale.

    Args:
        upright: whether the EXIF orientation is applied; if not, the pixels are as they are stored.
        choose_range: (values, their kind as in `deep_values`) -> the values that become 0 and 255; called for images of
            more than 8 bits. Default: the range of their type.
    """
    if not data:
        raise Undecodable("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_size(width, height, max_pixels)
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            kind = _deep_kind(image)
            orientation = _orientation(image)  # before load, which turns TIFF images upright
            image.load()
            pixels = _to_rgb(image, kind, choose_range)  # (H, W, 3)
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable(f"not an image: no {', '.join(FORMATS)} that can be read") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, 179 million pixels
        raise Undecodable(f"too many pixels: {' '.join(str(error).split())}") from error
    except Exception as error:  # decoders raise errors of many kinds
        message = " ".join(str(error).split())
        raise Undecodable(f"damaged: {type(error).__name__} {message}"[:200]) from error
    swapped, flips = _ORIENTATIONS.get(orientation, (False, ()))
    if image.format == "TIFF":
        oriented = pixels if upright else _undo(pixels, swapped, flips)
    else:
        oriented = np.flip(pixels.swapaxes(0, 1) if swapped else pixels, flips) if upright else pixels
    tensor = torch.from_numpy(np.ascontiguousarray(oriented)).permute(2, 0, 1)  # (3, H, W)
    if image.format not in ("JPEG", "MPO"):  # only these are decoded at a reduced scale
        return tensor, (tensor.shape[1], tensor.shape[2])
    return tensor, (width, height) if swapped and upright else (height, width)


def _undo(pixels: NDArray[np.uint8], swapped: bool, flips: tuple[int, ...]) -> NDArray[np.uint8]:
    """Upright pixels (H, W, 3) as they were stored."""
    stored = np.flip(pixels, flips)
    return stored.swapaxes(0, 1) if swapped else stored


def has_orientation(data: bytes) -> bool:
    """Whether the pixels of an encoded image are stored otherwise than upright."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _orientation(image) in _ORIENTATIONS
    except Exception:  # decoding it gives the reason
        return False


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Undecodable(f"too many pixels: {width} x {height}, at most {max_pixels} (images.max_pixels)")
    if width < 1 or height < 1:
        raise Undecodable(f"damaged: size {width} x {height}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # an image with broken metadata is still used
        return 1


def deep_values(data: bytes) -> tuple[NDArray[np.generic], str]:
    """The values of an encoded image of more than 8 bits, and their kind; no values of other images.

    The kind is ``integer`` or ``float`` for grey values whose range the file does not tell, ``header`` where it does,
    ``colour`` for colours of 16 bits, of which Pillow reads the upper 8, else empty.

    Raises:
        Undecodable: the image cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, MAX_PIXELS)
            kind = _deep_kind(image)
            return (np.asarray(image) if kind else np.zeros(0)), kind
    except Exception as error:  # decoders raise errors of many kinds
        raise Undecodable(f"damaged: {type(error).__name__}") from error


def _deep_kind(image: ImageFile.ImageFile) -> str:
    """The kind of an image that is not loaded yet, see `deep_values`."""
    if image.format == "PPM" and image.mode.startswith("I"):
        return "header"
    if image.mode.startswith("I") or image.mode == "F":
        return "float" if image.mode == "F" else "integer"
    return "colour" if ";16" in str([tile[3] for tile in image.tile]) else ""


def _to_rgb(image: Image.Image, kind: str, choose_range: ChooseRange | None) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of an image in any mode of Pillow."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        bounds = _type_range(values) if choose_range is None else choose_range(values, kind)
        return np.repeat(_to_eight_bits(values, bounds)[:, :, None], 3, axis=2)
    if kind and choose_range is not None:
        bands = np.asarray(image)  # (H, W, bands)
        choose_range(bands[..., :-1] if image.mode in ("LA", "RGBA") else bands, kind)  # warns of nearly black images
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return np.array(Image.alpha_composite(white, layers).convert("RGB"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _type_range(values: NDArray[np.generic]) -> GreyRange:
    """The range of the type of grey values of more than 8 bits; values outside of it are scaled by their own range."""
    exact = values.astype(np.float64)
    finite = exact[np.isfinite(exact)]
    if not finite.size:
        raise Undecodable("damaged: no finite pixel")
    low, high = float(finite.min()), float(finite.max())
    maxima = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    return next(((0.0, top) for top in maxima if low >= 0 and high <= top), (low, high))


def _to_eight_bits(values: NDArray[np.generic], bounds: GreyRange) -> NDArray[np.uint8]:
    """Scale grey values (H, W) from a range to 0..255; Pillow's conversion would clip at 255."""
    exact = values.astype(np.float64)
    finite = np.isfinite(exact)
    if not finite.any():
        raise Undecodable("damaged: no finite pixel")
    bottom, top = bounds
    scaled = (np.where(finite, exact, bottom) - bottom) * (255.0 / max(top - bottom, 1e-300))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)
