"""The pixels that a student takes, checked where users call it."""

from __future__ import annotations

import torch
from torch import Tensor

# Bicubic resizing leaves [0, 1] by up to .45, on both sides of edges. Of 1,009 photos normalized by a mean and a
# deviation, all leave this range with those of ImageNet or CLIP, and 84 % with .5 and .5.
LOW, HIGH = -0.5, 1.5
# 2 x - 1 is never above 1: an image with more than this fraction of its values this far below 0, and none above 1,
# is normalized. This finds 136 of the other 169 photos; none of them, and no text or line art, looks so if resized.
DARK, MAX_DARK_FRACTION, WHITE = -0.15, 0.002, 1.01
EXPECTED = "a student takes floats (B, 3, h, w) in [0, 1] and normalizes them itself"


def check_pixels(pixels: Tensor) -> None:
    """Refuse what cannot be pixels in [0, 1]: a student would compute features of a wrong image without a word.

    Args:
        pixels: (B, 3, h, w).

    Raises:
        ValueError: naming what was given.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: {EXPECTED}, got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels: {EXPECTED}, got {pixels.dtype}; divide bytes by 255")
    if pixels.is_meta or pixels.numel() == 0 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # no values to look at
    low, high = (float(value) for value in pixels.detach().aminmax())
    if not (low >= LOW and high <= HIGH) or (low < DARK and _looks_normalized(pixels.detach())):
        raise ValueError(
            f"pixels: {EXPECTED}, got values from {low:.3g} to {high:.3g}; divide bytes by 255, leave out mean and std"
        )


def _looks_normalized(pixels: Tensor) -> bool:
    """Whether any of the images (B, 3, h, w) has more dark values than resizing leaves."""
    values = pixels.flatten(1)
    dark = (values < DARK).float().mean(1) > MAX_DARK_FRACTION
    return bool((dark & (values.amax(1) <= WHITE)).any())
