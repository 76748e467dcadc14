"""Augmented views of a task's images and their targets.

Views are pure functions of (seed, image, step) and minibatches of (seed, step): the same settings give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from shoulders.errors import DataError
from shoulders.features import Skipped
from shoulders.images import WHOLE_IMAGE, View, min_decode_side, random_view, render
from shoulders.tasks.feature_bank import minibatches
from shoulders.tasks.task import FinetuneTask, Size

MAX_CACHED_BYTES = 2 * 2**30  # of decoded images


class AugmentedViews:
    """Augmented views of the images of a split, and their targets.

    Args:
        task: reads images and computes targets.
        split: of that task.
        size: (h, w) of the views in px.
        scale: smallest and largest area of a view, as fractions of the image.
        seed: of the views and of their order.

    Attributes:
        skipped: the images that could not be read so far, by their position in the split.
    """

    def __init__(self, task: FinetuneTask, split: Any, size: Size, scale: tuple[float, float], seed: int) -> None:
        self.task, self.split, self.size, self.scale, self.seed = task, split, size, scale, seed
        self.skipped: dict[int, Skipped] = {}
        min_side = min_decode_side([size], scale)
        cached_images = max(1, MAX_CACHED_BYTES // (3 * (2 * min_side) ** 2))
        self.read = lru_cache(maxsize=cached_images)(partial(_read, task, split, min_side=min_side))

    def draw(self, position: int, step: int, grid: tuple[int, int]) -> tuple[Tensor, Any] | None:
        """The view (3, h, w) uint8 of an image at a step and its target; None where it cannot be read."""
        read = self.read(position)
        if isinstance(read, Skipped):
            self.skipped[position] = read
            return None
        pixels, full_size = read
        image_id = int(self.split.images.ids[self.split.indices[position]])
        shape = self.size if self.task.whole_images else full_size
        view = snap_to_pixels(random_view(self.seed, image_id, step, self.scale, True, shape), full_size)
        return render(pixels, view, self.size), self.task.target(self.split, position, view, grid)

    def batches(
        self, batch: int, steps: int, grid: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """Pixels (B, 3, h, w) in [0, 1] and B targets for each step.

        Raises:
            DataError: none of the images of a step can be read.
        """
        order = minibatches(len(self.split.indices), batch, steps, torch.Generator().manual_seed(self.seed))
        with ThreadPoolExecutor(workers) if workers else nullcontext() as pool:
            for step, positions in enumerate(order):
                pairs = list((pool.map if pool else map)(partial(self.draw, step=step, grid=grid), positions))
                drawn = [pair for pair in pairs if pair is not None]
                if not drawn:
                    first = self.skipped[positions[0]]
                    raise DataError(
                        f"none of {len(positions)} images can be read; the first: {first.name} ({first.reason})"
                    )
                yield torch.stack([pixels for pixels, _ in drawn]).float() / 255, [target for _, target in drawn]


def _read(task: FinetuneTask, split: Any, position: int, min_side: int) -> tuple[Tensor, Size] | Skipped:
    """An image no larger than twice what its views need, so that many fit into memory."""
    read = task.read_image(split, position, min_side)
    if isinstance(read, Skipped):
        return read
    pixels, full_size = read
    ratio = min(pixels.shape[1:]) / min_side
    if ratio <= 2:
        return pixels, full_size
    return render(pixels, WHOLE_IMAGE, (round(pixels.shape[1] / ratio), round(pixels.shape[2] / ratio))), full_size


def snap_to_pixels(view: View, size: Size) -> View:
    """The view with its sides on whole pixels of the original, so that labels are cut exactly where pixels are."""

    def snap(start: float, length: float, side: int) -> tuple[float, float]:
        first = min(round(start * side), side - 1)
        return first / side, (max(first + 1, min(side, round((start + length) * side))) - first) / side

    (top, height), (left, width) = snap(view.top, view.height, size[0]), snap(view.left, view.width, size[1])
    return View(top, left, height, width, view.flip)
