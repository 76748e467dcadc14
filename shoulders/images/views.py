"""Views: crops of an image, possibly mirrored, and their rendering at a size."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

_RATIO = (3 / 4, 4 / 3)  # width / height in pixels of the original, the usual range of random resized crops
_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """A box in the original image, in fractions of its height and width, and whether it is mirrored."""

    top: float
    left: float
    height: float
    width: float
    flip: bool = False


WHOLE_IMAGE = View(0.0, 0.0, 1.0, 1.0)


def random_view(
    seed: int, image_id: int, visit: int, scale: tuple[float, float], flip: bool, original: tuple[int, int]
) -> View:
    """A random resized crop: a pure function of its arguments.

    Args:
        seed: of the run.
        image_id: stable id of the image.
        visit: number of earlier visits to the image, or number of the view.
        scale: smallest and largest area, as fractions of the image.
        flip: mirror half of the views.
        original: (H, W) of the whole upright image in pixels; only its aspect matters.
    """
    aspect = original[1] / original[0]
    for attempt in range(_ATTEMPTS):
        area, ratio, top, left, mirror = _uniforms(seed, image_id, visit, attempt)
        area = scale[0] + area * (scale[1] - scale[0])
        ratio = math.exp(math.log(_RATIO[0]) + ratio * (math.log(_RATIO[1]) - math.log(_RATIO[0])))
        height, width = math.sqrt(area * aspect / ratio), math.sqrt(area * ratio / aspect)
        if height <= 1 and width <= 1:
            break
    else:
        # no such box fits into the image: take the largest box of the nearest ratio, anywhere along the long side
        ratio = min(max(aspect, _RATIO[0]), _RATIO[1])
        height, width = min(1.0, aspect / ratio), min(1.0, ratio / aspect)
    return View(top * (1 - height), left * (1 - width), height, width, flip and mirror < 0.5)


def central_view(original: tuple[int, int], size: tuple[int, int]) -> View:
    """The largest central box with the aspect of ``size``, not mirrored; both are (H, W) in pixels."""
    aspect, target = original[1] / original[0], size[1] / size[0]
    height, width = min(1.0, aspect / target), min(1.0, target / aspect)
    return View((1 - height) / 2, (1 - width) / 2, height, width)


def render(original: Tensor, view: View, size: tuple[int, int]) -> Tensor:
    """Render a view of an image (3, H, W) uint8 at ``size`` = (h, w) in pixels, bicubic: (3, h, w) uint8."""
    top, bottom = _whole_pixels(view.top, view.height, original.shape[1])
    left, right = _whole_pixels(view.left, view.width, original.shape[2])
    box = original[None, :, top:bottom, left:right]
    rendered = F.interpolate(box, size, mode="bicubic", antialias=True)[0]  # (3, h, w)
    return (rendered.flip(2) if view.flip else rendered).contiguous()


def longest_side(sizes: list[tuple[int, int]]) -> int:
    """The longest side of all sizes in pixels; images are decoded for it when only central views are needed."""
    return max(max(size) for size in sizes)


def min_decode_side(sizes: list[tuple[int, int]], scale: tuple[float, float]) -> int:
    """Shortest side in pixels of a decoded image from which no view of ``scale[0]`` of its area has to be enlarged."""
    return math.ceil(longest_side(sizes) / math.sqrt(scale[0] * _RATIO[0]))


def _whole_pixels(start: float, length: float, side: int) -> tuple[int, int]:
    first = min(round(start * side), side - 1)
    return first, max(first + 1, min(side, round((start + length) * side)))


def _uniforms(*key: int) -> list[float]:
    """Five numbers in [0, 1) that depend on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=40).digest()
    return [(word >> 11) * 2.0**-53 for word in struct.unpack("<5Q", digest)]
