"""The pixels that a student takes, checked where users call it."""

from __future__ import annotations

import torch
from torch import Tensor

# bicubic resizing leaves [0, 1] by up to .4, bytes and normalized pixels of nearly every image by more
LOW, HIGH = -0.5, 1.5
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
    if not (low >= LOW and high <= HIGH):
        raise ValueError(
            f"pixels: {EXPECTED}, got values from {low:.3g} to {high:.3g}; divide bytes by 255, leave out mean and std"
        )
