"""Images that are brighter than all others, and a teacher whose features of these are not what they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shoulders.config.recipe import Recipe
from shoulders.features import Features
from shoulders.images import open_images
from shoulders.teachers import Teacher


class Marked(nn.Module):
    """Mean colours of 8 x 8 px; for bright images, or for all, the features are ``value`` everywhere.

    Args:
        value: of the features.
        everywhere: whether it is the value for all images but a blank one, with which shapes are found.
        spread: whether the features are multiplied by the value, so that they still differ.
    """

    def __init__(self, value: float, everywhere: bool = False, spread: bool = False) -> None:
        super().__init__()
        self.value, self.everywhere, self.spread = value, everywhere, spread

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        features = Features.from_map(nn.functional.avg_pool2d(pixels, 8), pixels.mean((2, 3)))
        marked = pixels.mean((1, 2, 3)) > 0.6
        if self.everywhere:
            marked = pixels.flatten(1).std(1) > 1e-3

        def mark(x: Tensor) -> Tensor:
            value = x * self.value if self.spread else torch.full_like(x, self.value)
            return torch.where(marked.view(-1, *[1] * (x.ndim - 1)), value, x)

        return {"map": features.map(mark)}


def marked_teacher(value: float, everywhere: bool = False, spread: bool = False) -> Teacher:
    """A `Marked` as a teacher of 32 px."""
    return Teacher(Marked(value, everywhere, spread), (32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)


def mark_images(recipe: Recipe, training: int, heldout: int) -> set[str]:
    """Replace some images of a recipe's folder by bright ones; returns their names."""
    images = open_images(recipe.images, recipe.train.seed)
    first = np.concatenate(list(images.training.values()))[:training]
    names = {images.collection.name(int(i)) for i in (*first, *images.heldout[:heldout])}
    rng = np.random.default_rng(1)
    for name in names:
        pixels = rng.integers(200, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(recipe.images.path or "") / name)
    return names


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether all values of all tensors are finite."""
    return all(bool(torch.isfinite(x).all()) for x in tensors.values())
