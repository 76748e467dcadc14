"""The spatial features of a split: computed once and kept, or anew for each minibatch where they are too many."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoulders.errors import DataError, NumericError, RecipeError
from shoulders.features import Batch, Features, Skipped
from shoulders.images import Undecodable, View, render
from shoulders.tasks.data.dense import DenseSplit, T

KEEP_BYTES = 8 * 2**30  # of float16 features of one split; more are computed anew
HELD_SHARE = 0.2
MAX_PIXELS = 50_000_000
WHOLE = View(0.0, 0.0, 1.0, 1.0)
_LARGEST = torch.finfo(torch.float16).max


class FeatureBank(Generic[T]):
    """Features of the images that can be read, each drawn whole at the input size, whatever its aspect.

    Args:
        features_of: Features of a batch; whoever gives it puts it on its device.
        split: the images.
        size: (h, w) that ``features_of`` asks its batches for.
        batch: images at a time.
        workers: threads that decode.
        keep_bytes: see `KEEP_BYTES`.

    Attributes:
        truths: what is known of the n images that can be read, in order.
        skipped: the others.
        grid: (H, W) of the features; ``width`` is their C, ``device`` where they are computed.

    Raises:
        DataError: an image of another size than its labels, or none that can be read.
        RecipeError: the features have no spatial part.
        NumericError: a feature is not finite.
    """

    def __init__(
        self,
        features_of: Callable[[Batch], Features],
        split: DenseSplit[T],
        size: tuple[int, int],
        batch: int,
        workers: int,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self.features_of, self.split, self.size, self.batch, self.workers = features_of, split, size, batch, workers
        self.skipped: list[Skipped] = []
        self.device = torch.device("cpu")
        self.kept: Tensor | None = None  # (readable, C, H, W) float16
        readable: list[int] = []
        for positions, pixels in self._rendered(np.arange(len(split.indices)), self.skipped):
            if not readable:
                shape = (len(split.indices), *self._compute(positions[:1], pixels[:1]).shape[1:])
                if 2 * math.prod(shape) <= keep_bytes:
                    self.kept = torch.empty(shape, dtype=torch.float16)
            if self.kept is not None:  # else this pass only finds out which images can be read
                self.kept[len(readable) : len(readable) + len(positions)] = self._compute(positions, pixels)
            readable += positions
        if not readable:
            first = self.skipped[0]
            raise DataError(f"none of {len(self.skipped)} images can be read; the first: {first.name} ({first.reason})")
        self.readable = np.array(readable, dtype=np.int64)  # positions in the split
        self.rows = np.arange(len(readable))  # (n,) in `readable` and `kept`
        self.truths = [split.truths[position] for position in readable]
        self.width, self.grid = shape[1], (shape[2], shape[3])

    def __len__(self) -> int:
        return len(self.truths)

    def maps(self, rows: Sequence[int]) -> Tensor:
        """Features (B, C, H, W) float32 of some of the n images, on the device."""
        wanted = self.rows[list(rows)]
        if self.kept is not None:
            return self.kept[torch.from_numpy(wanted)].to(self.device).float()
        drawn = self._rendered(self.readable[wanted], [])
        return torch.cat([self._compute(*part) for part in drawn]).to(self.device).float()

    def take(self, rows: NDArray[np.int64]) -> FeatureBank[T]:
        """Some of the n images, (m,); what is kept is shared."""
        taken = copy.copy(self)
        taken.rows, taken.truths = self.rows[rows], [self.truths[row] for row in rows.tolist()]
        return taken

    def ids(self) -> NDArray[np.int64]:
        """(n,) stable ids."""
        return self.split.images.ids[self.split.indices[self.readable[self.rows]]]

    @torch.no_grad()
    def _compute(self, positions: Sequence[int], pixels: Tensor) -> Tensor:
        """(B, C, H, W) float16 on the CPU, the same whether kept or computed anew."""
        ids = torch.from_numpy(self.split.images.ids[self.split.indices[list(positions)]])
        features = self.features_of(Batch(ids, {self.size: pixels}))
        if features.spatial is None:
            raise RecipeError("these features have no spatial part, which a task on places needs; leave the model out")
        self.device = features.spatial.device
        maps = features.to_map().float()
        if not maps.isfinite().all():
            first = self.split.images.name(int(self.split.indices[positions[0]]))
            raise NumericError(f"features of {first}, or of those read with it, are not finite: check the weights")
        return as_kept(maps).cpu()

    def _rendered(self, positions: NDArray[np.int64], skipped: list[Skipped]) -> Iterator[tuple[list[int], Tensor]]:
        """Positions of images and their pixels (B, 3, h, w) uint8, a batch at a time; `skipped` gets the others."""
        # threads, not processes: Pillow and torch release the lock, and the truths need not be copied
        with ThreadPoolExecutor(self.workers) if self.workers else nullcontext() as pool:
            for start in range(0, len(positions), self.batch):
                wanted = positions[start : start + self.batch].tolist()
                drawn = list((pool.map if pool else map)(self._draw, wanted))
                skipped += [image for image in drawn if isinstance(image, Skipped)]
                pairs = [(at, image) for at, image in zip(wanted, drawn, strict=True) if isinstance(image, Tensor)]
                if pairs:
                    yield [at for at, _ in pairs], torch.stack([image for _, image in pairs])

    def _draw(self, position: int) -> Tensor | Skipped:
        drawn = read(self.split, position, max(self.size))
        return drawn if isinstance(drawn, Skipped) else render(drawn, WHOLE, self.size)


def as_kept(maps: Tensor) -> Tensor:
    """Features as probes are fitted on them: float16, what is too large for it cut off."""
    return maps.clamp(-_LARGEST, _LARGEST).half()


def read(split: DenseSplit[T], position: int, at_least: int) -> Tensor | Skipped:
    """The decoded image (3, H, W) uint8 of a place in a split, no smaller than `at_least` px needs.

    Raises:
        DataError: an image of another size than its labels.
    """
    index, size = int(split.indices[position]), split.truths[position].size
    name = split.images.name(index)
    try:
        pixels, full_size = split.images.pixels(index, MAX_PIXELS, at_least)
    except Undecodable as error:
        return Skipped(name, str(error))
    check_size(name, full_size, size)
    return pixels


def check_size(name: str, image: tuple[int, int], labels: tuple[int, int]) -> None:
    """Refuse labels of another size (h, w) than their image.

    Raises:
        DataError: naming it.
    """
    if image != labels:
        raise DataError(
            f"{name}: the image is {image[1]} x {image[0]} px, its labels are for {labels[1]} x {labels[0]} px; make "
            f"them agree, or leave it out"
        )


def hold_out(train: FeatureBank[T]) -> tuple[FeatureBank[T], FeatureBank[T]]:
    """Images to fit on, and the fifth with the lowest ids to choose on; see `held_out`."""
    kept, held = held_out(train.ids())
    return train.take(kept), train.take(held)


def held_out(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit on, and those of the fifth with the lowest ids (n,) to choose on, both in order.

    Raises:
        DataError: only one image.
    """
    if len(ids) < 2:
        raise DataError("train: one image alone; add some, one has to be held out to choose on")
    order = np.argsort(ids, kind="stable")
    held = max(1, round(HELD_SHARE * len(order)))
    return np.sort(order[held:]), np.sort(order[:held])


def minibatches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """`steps` lists of `size` rows out of `count`, each epoch in a new order; of `count` where that is less."""
    size = min(size, count)
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        rows, waiting = waiting[:size], waiting[size:]
        yield rows
