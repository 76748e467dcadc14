"""Where an image lies in the input of a model that crops or pads it, and predictions brought back from there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The input of a model in px of the original image.

    Args:
        size: (h, w) of the original.
        input_size: (h, w) of the input, with its padding and without what is cropped away.
        top, left: of the corner of the image in the input; below 0 where the image is cropped.
    """

    size: tuple[int, int]
    input_size: tuple[int, int]
    top: int = 0
    left: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether the input is the whole image, neither cropped nor padded."""
        return self == whole_frame(self.size)

    def maps_in_image(self, maps: Tensor, fill: float) -> Tensor:
        """Maps (.., h, w) of the input as maps of the original; ``fill`` is their value outside of the input."""
        if self.is_whole:
            return maps
        (h, w), (top, left) = self.size, (max(0, -self.top), max(0, -self.left))
        inside = maps[..., max(0, self.top) : self.top + h, max(0, self.left) : self.left + w]
        image = torch.full((*maps.shape[:-2], h, w), fill, dtype=maps.dtype, device=maps.device)
        image[..., top : top + inside.shape[-2], left : left + inside.shape[-1]] = inside
        return image

    def boxes_in_image(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes (n, 4) in px of the input as boxes in px of the original, clipped to it."""
        if self.is_whole:
            return boxes
        shifted = boxes - np.array([self.left, self.top, self.left, self.top], dtype=np.float64)
        return shifted.clip(0, np.array([self.size[1], self.size[0]] * 2, dtype=np.float64))


def whole_frame(size: tuple[int, int]) -> Frame:
    """The frame of an image of ``size`` = (h, w) px that is resized whole."""
    return Frame(size, size)


@dataclass(frozen=True)
class ModelInput:
    """One image as a model takes it: arguments of the model without the dimension of the batch, and the frame."""

    tensors: dict[str, Tensor]
    frame: Frame
