"""Read index masks: the class of each pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shoulders.errors import DataError

IGNORE_INDEX = 255
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # of Pillow: one number per pixel
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # greys of 2 and 4 bits, which Pillow spreads over 0 to 255
_LOSSLESS_FORMATS = ("BMP", "PNG", "PPM", "TIFF")  # of Pillow; GIF is not, writers sort its palette
_LOSSLESS_TIFF = (
    "raw",
    "packbits",
    "group3",
    "group4",
    "tiff_lzw",
    "tiff_deflate",
    "tiff_adobe_deflate",
    "lzma",
    "zstd",
)


@dataclass(frozen=True)
class Mask:
    """A mask as it is stored.

    Args:
        indices: (H, W) of any integer type.
        palette: (n, 3) uint8, the colour in which viewers show an index; None where there is none.
    """

    indices: NDArray[np.generic]
    palette: NDArray[np.uint8] | None


def open_mask(path: Path) -> Mask:
    """The indices of a file as they are stored.

    Raises:
        DataError: the file and the reason.
    """
    try:
        with Image.open(path) as image:  # its warnings are ignored, see `shoulders.images.decode`
            _check_storage(image)
            step = _GREY_STEPS.get(str(image.tile[0].args), 1) if image.tile else 1
            indices = np.asarray(image)
            palette = image.getpalette("RGB") if image.mode == "P" else None
    except Exception as error:  # no list of what decoders raise is ever complete
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a mask that can be read: {reason}; correct it or leave it out") from error
    indices = indices.astype(np.uint8) if indices.dtype == bool else indices // indices.dtype.type(step)
    return Mask(indices, None if palette is None else np.array(palette, dtype=np.uint8).reshape(-1, 3))


def _check_storage(image: Image.Image) -> None:
    """Refuse what changes indices: colours, lossy compression, and several frames."""
    if image.format not in _LOSSLESS_FORMATS:
        raise ValueError(f"it is a {image.format} file, which need not keep every index; save it as PNG")
    if image.format == "TIFF" and (how := image.info.get("compression", "raw")) not in _LOSSLESS_TIFF:
        raise ValueError(f"its compression, {how}, need not keep every index; save it as PNG")
    if image.mode not in _INDEX_MODES:
        raise ValueError(f"it holds colours ({image.mode}), not one index for each pixel")
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"it holds {frames} images; save the one with the classes")


def read_mask(path: Path, n_classes: int) -> NDArray[np.uint8]:
    """The class of each pixel (H, W); 255 where the index is none of the ``n_classes``.

    Raises:
        DataError: the file and the reason.
    """
    indices = open_mask(path).indices.astype(np.int64)
    return np.where((indices >= 0) & (indices < n_classes), indices, IGNORE_INDEX).astype(np.uint8)
