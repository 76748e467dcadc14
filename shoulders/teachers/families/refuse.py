"""Which heads cannot be separated from their encoders: one ``refuse_*`` per reason.

Each takes (config, (h, w) of the images in px) and returns the reason, or "".
"""

from __future__ import annotations

from typing import Any


def refuse_sam2(config: Any, size: tuple[int, int]) -> str:
    """SAM 2 encodes prompts for one size."""
    side = config.prompt_encoder_config.image_size
    return "" if size == (side, side) else f"its head takes images of {side} x {side} px alone; set size: {side}"


def refuse_beit(config: Any, size: tuple[int, int]) -> str:
    """BEiT counts hidden states from the input of the first block."""
    return "" if min(config.out_indices) > 1 else "its head takes the input of the first block, which no tap holds"


def refuse_dpt(config: Any, size: tuple[int, int]) -> str:
    """DPT with a ViT of its own."""
    if config.is_hybrid:
        return "the head of a hybrid DPT also takes maps of its convolutional stem, which no tap holds"
    # without a backbone_config the neck takes the square root of the number of tokens
    return "" if size[0] == size[1] else f"its head takes square images alone, not {size[0]} x {size[1]} px; set size:"
