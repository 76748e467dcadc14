"""The spatial features of a split: computed once and stored, or again for each minibatch where they are too many."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoulders.errors import DataError, NumericError, RecipeError
from shoulders.features import Batch, FeaturesOf, Skipped
from shoulders.images import MAX_PIXELS, WHOLE_IMAGE, Undecodable, render
from shoulders.tasks.data.splits import AnnotatedSplit, T
from shoulders.tasks.skipped import check_skipped

MAX_STORED_BYTES = 8 * 2**30  # of float16 features of one split; more are computed again
HELD_OUT_FRACTION = 0.2
EVAL_BATCH = 16
_FLOAT16_MAX = torch.finfo(torch.float16).max

Rendered = dict[tuple[int, int], Tensor]  # {(h, w): pixels (B, 3, h, w) uint8}


class FeatureBank(Generic[T]):
    """Features of the readable images of a split, each drawn whole at the input size, whatever its aspect.

    Args:
        features_of: Features of a batch, on whichever device it computes.
        split: the images.
        sizes: (h, w) in px of the inputs that ``features_of`` needs.
        batch: images per batch.
        workers: threads that decode.
        max_bytes: see `MAX_STORED_BYTES`.

    Attributes:
        annotations: of the n readable images, in order.
        skipped: the others.
        grid: (H, W) of the features; ``width`` is their C, ``device`` where they are computed.

    Raises:
        DataError: an image of another size than its annotation, or too many that cannot be read.
        RecipeError: the features have no spatial component.
        NumericError: a feature is not finite.
    """

    def __init__(
        self,
        features_of: FeaturesOf,
        split: AnnotatedSplit[T],
        sizes: Sequence[tuple[int, int]],
        batch: int,
        workers: int,
        max_bytes: int = MAX_STORED_BYTES,
    ) -> None:
        self.features_of, self.split, self.sizes, self.batch, self.workers = features_of, split, sizes, batch, workers
        self.skipped: list[Skipped] = []
        self.device = torch.device("cpu")
        self.stored: Tensor | None = None  # (readable, C, H, W) float16
        readable: list[int] = []
        for positions, pixels in self._render(np.arange(len(split.indices)), self.skipped):
            if not readable:
                first = {size: images[:1] for size, images in pixels.items()}
                shape = (len(split.indices), *self._compute(positions[:1], first).shape[1:])
                if 2 * math.prod(shape) <= max_bytes:
                    self.stored = torch.empty(shape, dtype=torch.float16)
            if self.stored is not None:  # else this pass only finds out which images can be read
                self.stored[len(readable) : len(readable) + len(positions)] = self._compute(positions, pixels)
            readable += positions
        if not readable:
            name, reason = self.skipped[0].name, self.skipped[0].reason
            raise DataError(f"none of {len(self.skipped)} images can be read; the first: {name} ({reason})")
        check_skipped(self.skipped, len(split.indices))
        self.readable = np.array(readable, dtype=np.int64)  # positions in the split
        self.indices = np.arange(len(readable))  # (n,) in `readable` and `stored`
        self.annotations = [split.annotations[position] for position in readable]
        self.width, self.grid = shape[1], (shape[2], shape[3])

    def __len__(self) -> int:
        return len(self.annotations)

    def maps(self, indices: Sequence[int]) -> Tensor:
        """Features (B, C, H, W) float32 of some of the n images, on the device."""
        chosen = self.indices[list(indices)]
        if self.stored is not None:
            return self.stored[torch.from_numpy(chosen)].to(self.device).float()
        rendered = self._render(self.readable[chosen], [])
        return torch.cat([self._compute(*part) for part in rendered]).to(self.device).float()

    def take(self, indices: NDArray[np.int64]) -> FeatureBank[T]:
        """The bank of some of the n images, (m,); stored features are shared."""
        taken = copy.copy(self)
        taken.indices, taken.annotations = self.indices[indices], [self.annotations[i] for i in indices.tolist()]
        return taken

    def batches(self) -> Iterator[tuple[range, Tensor]]:
        """Indices of images and their features (B, C, H, W), in order."""
        for start in range(0, len(self), EVAL_BATCH):
            indices = range(start, min(start + EVAL_BATCH, len(self)))
            yield indices, self.maps(indices)

    def ids(self) -> NDArray[np.int64]:
        """(n,) stable ids."""
        return self.split.images.ids[self.split.indices[self.readable[self.indices]]]

    @torch.no_grad()
    def _compute(self, positions: Sequence[int], rendered: Rendered) -> Tensor:
        """(B, C, H, W) float16 on the CPU, the same whether stored or computed again."""
        ids = torch.from_numpy(self.split.images.ids[self.split.indices[list(positions)]])
        features = self.features_of(Batch(ids, rendered))
        if features.spatial is None:
            raise RecipeError("these features have no spatial component, which this task needs; leave the model out")
        self.device = features.spatial.device
        maps = features.to_map().float()
        if not maps.isfinite().all():
            first = self.split.images.name(int(self.split.indices[positions[0]]))
            raise NumericError(f"features of {first}, or of its batch, are not finite: check the weights")
        return to_float16(maps).cpu()

    def _render(self, positions: NDArray[np.int64], skipped: list[Skipped]) -> Iterator[tuple[list[int], Rendered]]:
        """Positions of images and their pixels, per batch; unreadable ones go to `skipped`."""
        # threads, not processes: Pillow and torch release the lock, and the annotations need not be copied
        with ThreadPoolExecutor(self.workers) if self.workers else nullcontext() as pool:
            for start in range(0, len(positions), self.batch):
                of_batch = positions[start : start + self.batch].tolist()
                drawn = list((pool.map if pool else map)(self._draw, of_batch))
                skipped += [image for image in drawn if isinstance(image, Skipped)]
                readable = [image for image in drawn if not isinstance(image, Skipped)]
                if readable:
                    kept = [pair[0] for pair in zip(of_batch, drawn, strict=True) if not isinstance(pair[1], Skipped)]
                    yield kept, {size: torch.stack([image[size] for image in readable]) for size in self.sizes}

    def _draw(self, position: int) -> Rendered | Skipped:
        """An image (3, h, w) at each size."""
        image = read_image(self.split, position, max(max(size) for size in self.sizes))
        return image if isinstance(image, Skipped) else {size: render(image, WHOLE_IMAGE, size) for size in self.sizes}


def to_float16(maps: Tensor) -> Tensor:
    """Features as probes are fitted on them: float16, with values beyond its range clipped."""
    return maps.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()


def read_image(split: AnnotatedSplit[T], position: int, min_side: int) -> Tensor | Skipped:
    """A decoded image (3, H, W) uint8 of a split, no smaller than ``min_side`` px needs.

    Raises:
        DataError: an image of another size than its annotation.
    """
    index, size = int(split.indices[position]), split.annotations[position].size
    name = split.images.name(index)
    try:
        pixels, full_size = split.images.pixels(index, MAX_PIXELS, min_side)
    except Undecodable as error:
        return Skipped(name, str(error))
    check_size(name, full_size, size)
    return pixels


def check_size(name: str, image: tuple[int, int], annotation: tuple[int, int]) -> None:
    """Refuse an annotation of another size (h, w) than its image.

    Raises:
        DataError: naming the image.
    """
    if image != annotation:
        stored = " (as it is stored, without EXIF orientation)" if image == annotation[::-1] else ""
        raise DataError(
            f"{name}: the image is {image[1]} x {image[0]} px{stored}, its labels are for {annotation[1]} x "
            f"{annotation[0]} px; make them agree, or leave it out"
        )


def hold_out(train: FeatureBank[T]) -> tuple[FeatureBank[T], FeatureBank[T]]:
    """Images to fit on, and images to select on; see `held_out_indices`."""
    fit, select = held_out_indices(train.ids())
    return train.take(fit), train.take(select)


def held_out_indices(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices into ids (n,) to fit on, and those of the fifth with the lowest ids to select on, both in order.

    Raises:
        DataError: only one image.
    """
    if len(ids) < 2:
        raise DataError("train: only one image; add some, one has to be held out to select hyperparameters on")
    order = np.argsort(ids, kind="stable")
    count = max(1, round(HELD_OUT_FRACTION * len(order)))
    return np.sort(order[count:]), np.sort(order[:count])


def minibatches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """``steps`` lists of ``size`` indices below ``count``, each epoch in a new order; shorter where count is less."""
    size = min(size, count)
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        indices, waiting = waiting[:size], waiting[size:]
        yield indices
