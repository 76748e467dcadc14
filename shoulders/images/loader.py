"""Batches of rendered views: for training in an endless random order, for evaluation in order."""

from __future__ import annotations

import dataclasses
import signal
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shoulders.config import recipe
from shoulders.errors import DataError, RecipeError
from shoulders.features import CENTRAL, Batch, Skipped
from shoulders.images.decode import Undecodable
from shoulders.images.image_set import Collection, ImageSet
from shoulders.images.views import View, central_view, longest_side, min_decode_side, random_view, render

Size = tuple[int, int]
_GRACE_S = 20
# plain containers, because DataLoader pins nothing else: the five fields of Batch
Rendered = tuple[Tensor, dict[Size, Tensor], Tensor | None, tuple[Skipped, ...], Tensor]


def batches(
    image_set: ImageSet,
    sizes: list[Size],
    settings: recipe.Images,
    *,
    batch: int,
    seed: int,
    steps: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    decode_sizes: Sequence[Size] = (),
) -> Generator[Batch, None, None]:
    """This rank's part of the batches of steps [first_step, first_step + steps).

    Content depends neither on the number of workers nor on where a run was resumed. Step s is made of
    positions [s * batch, (s + 1) * batch) of the order of `ImageSet`; each rank has a contiguous slice. An
    image that cannot be decoded is replaced by another of its source and reported in ``Batch.skipped``. JPEG
    is decoded no larger than the largest of ``sizes`` needs, so a rendering may depend a little on that size.

    Args:
        image_set: see `ImageSet`.
        sizes: every (h, w) that someone will ask the batch for.
        settings: views, scale, flip, max_pixels and workers are used.
        batch: images per step over all ranks.
        seed: of the views.
        first_step: where a resumed run goes on.
        steps: how many batches.
        decode_sizes: further sizes that are not drawn, but that decoding allows for as if they were.

    Raises:
        RecipeError: batch not divisible by world_size.
        DataError: an image could not be decoded, nor any of 20 others tried in its place.
    """
    if batch % world_size:
        raise RecipeError(
            f"train.batch={batch} cannot be shared by {world_size} ranks; make it a multiple of {world_size}"
        )
    share = batch // world_size

    def wanted() -> Iterator[NDArray[np.int64]]:
        for step in range(first_step, first_step + steps):
            yield image_set.positions(step * batch + rank * share, share)

    views = _TrainingViews(image_set, sizes, settings, seed, [*sizes, *decode_sizes])
    for rendered in _render_ahead(views, wanted(), settings.workers):
        yield _batch(rendered)


def evaluation_batches(
    images: Collection,
    sizes: list[Size],
    batch: int,
    indices: NDArray[np.int64] | None = None,
    workers: int = 0,
    max_pixels: int = 50_000_000,
    decode_sizes: Sequence[Size] = (),
    shape: Size | None = None,
) -> Iterator[Batch]:
    """Central views of images in order, with labels where ``images`` has them (-1 where one image has none).

    Images that cannot be decoded are left out and reported in ``Batch.skipped``, so batches may be smaller.

    Args:
        images: all images of one or more sources.
        sizes: every (h, w) that someone will ask the batch for.
        batch: images per batch.
        indices: which images, (n,); all by default. For the held-out ones: ``image_set.heldout``.
        decode_sizes: as in `batches`.
        shape: one view of this aspect for all sizes, as training draws them; default: at each size its own.

    Raises:
        DataError: not one image could be decoded.
    """
    chosen = np.arange(len(images)) if indices is None else indices
    wanted = (chosen[start : start + batch] for start in range(0, len(chosen), batch))
    ready: Batch | None = None
    skipped: tuple[Skipped, ...] = ()
    # one batch is kept back: skipped images of an empty batch must go with one that is handed out
    views = _CentralViews(images, sizes, max_pixels, [*sizes, *decode_sizes], shape)
    for rendered in _render_ahead(views, wanted, workers):
        current = _batch(rendered)
        if len(current) == 0:
            skipped += current.skipped
            continue
        if ready is not None:
            yield ready
        ready = dataclasses.replace(current, skipped=skipped + current.skipped)
        skipped = ()
    if ready is None:
        raise DataError(f"none of {len(chosen)} images could be decoded; the first: {skipped[:1]}")
    yield dataclasses.replace(ready, skipped=ready.skipped + skipped)


def listed_batches(
    image_set: ImageSet,
    wanted: Iterable[NDArray[np.int64]],
    sizes: list[Size],
    settings: recipe.Images,
    seed: int,
) -> Iterator[Batch]:
    """The views asked for by number, pixel for pixel those that `batches` and `evaluation_batches` draw.

    Images that cannot be decoded are left out and reported in ``Batch.skipped``: batches may be smaller, or empty.

    Args:
        wanted: (B, 2) for each batch: index of the image, and number of the view or `CENTRAL`.
        sizes: every (h, w) that someone will ask the batch for.
        settings, seed: as in `batches`.
    """
    for rendered in _render_ahead(_ListedViews(image_set, sizes, settings, seed), wanted, settings.workers):
        yield _batch(rendered)


def _batch(rendered: Rendered) -> Batch:
    """The five fields as a Batch; pinning memory turns tuples into lists."""
    ids, drawn, labels, skipped, views = rendered
    return Batch(ids, drawn, labels, tuple(skipped), views)


class _TrainingViews(Dataset[Rendered | DataError]):
    """(B, 2) of image index and visit -> random views of those images."""

    def __init__(
        self, image_set: ImageSet, sizes: list[Size], settings: recipe.Images, seed: int, decode_sizes: list[Size]
    ) -> None:
        self.image_set, self.sizes, self.settings, self.seed = image_set, sizes, settings, seed
        self.min_side = min_decode_side(decode_sizes, settings.scale)

    def __getitem__(self, wanted: NDArray[np.int64]) -> Rendered | DataError:
        ids = torch.empty(len(wanted), dtype=torch.int64)
        numbers = torch.empty(len(wanted), dtype=torch.int64)
        canvas = {size: torch.empty(len(wanted), 3, *size, dtype=torch.uint8) for size in self.sizes}
        skipped: list[Skipped] = []
        for row, (index, visit) in enumerate(wanted.tolist()):
            try:
                used, pixels, full_size = self._decode(index, skipped)
            except DataError as error:
                return error  # raised by the main process: a worker would wrap it into a traceback
            ids[row] = identity = int(self.image_set.collection.ids[used])
            numbers[row] = number = visit if self.settings.views == "fresh" else visit % self.settings.views
            view = random_view(self.seed, identity, number, self.settings.scale, self.settings.flip, full_size)
            for size in self.sizes:
                canvas[size][row] = render(pixels, view, size)
        return ids, canvas, None, tuple(skipped), numbers

    def _decode(self, index: int, skipped: list[Skipped]) -> tuple[int, Tensor, Size]:
        images = self.image_set.collection
        for candidate in [index, *self.image_set.replacements(index)]:
            try:
                return candidate, *images.pixels(candidate, self.settings.max_pixels, self.min_side)
            except Undecodable as error:
                skipped.append(Skipped(images.name(candidate), str(error)))
        raise DataError(
            f"{skipped[-1].name!r} ({skipped[-1].reason}): nor could any other image tried in place of "
            f"{images.name(index)!r} be decoded; check that images.path leads to whole image files"
        )


class _CentralViews(Dataset[Rendered | DataError]):
    """(B,) image indices -> central views of those that can be decoded."""

    def __init__(
        self, images: Collection, sizes: list[Size], max_pixels: int, decode_sizes: list[Size], shape: Size | None
    ) -> None:
        self.images, self.sizes, self.max_pixels, self.shape = images, sizes, max_pixels, shape
        self.min_side = longest_side(decode_sizes)

    def __getitem__(self, wanted: NDArray[np.int64]) -> Rendered | DataError:
        used: list[int] = []
        canvas = {size: torch.empty(len(wanted), 3, *size, dtype=torch.uint8) for size in self.sizes}
        skipped: list[Skipped] = []
        for index in wanted.tolist():
            try:
                pixels, full_size = self.images.pixels(index, self.max_pixels, self.min_side)
            except Undecodable as error:
                skipped.append(Skipped(self.images.name(index), str(error)))
                continue
            for size in self.sizes:
                canvas[size][len(used)] = render(pixels, central_view(full_size, self.shape or size), size)
            used.append(index)
        rendered = {size: drawn[: len(used)].contiguous() for size, drawn in canvas.items()}
        labels = None if self.images.labels is None else torch.from_numpy(self.images.labels[used])
        views = torch.full((len(used),), CENTRAL)
        return torch.from_numpy(self.images.ids[used]), rendered, labels, tuple(skipped), views


class _ListedViews(Dataset[Rendered | DataError]):
    """(B, 2) of image index and view number -> those views of the images that can be decoded."""

    def __init__(self, image_set: ImageSet, sizes: list[Size], settings: recipe.Images, seed: int) -> None:
        self.images, self.sizes, self.settings, self.seed = image_set.collection, sizes, settings, seed
        self.shape = recipe.as_size(settings.size)  # central views are cut for the student

    def __getitem__(self, wanted: NDArray[np.int64]) -> Rendered | DataError:
        used: list[tuple[int, int]] = []
        canvas = {size: torch.empty(len(wanted), 3, *size, dtype=torch.uint8) for size in self.sizes}
        skipped: list[Skipped] = []
        for index, number in wanted.tolist():
            random = number != CENTRAL
            min_side = min_decode_side(self.sizes, self.settings.scale) if random else longest_side(self.sizes)
            try:
                pixels, full_size = self.images.pixels(index, self.settings.max_pixels, min_side)
            except Undecodable as error:
                skipped.append(Skipped(self.images.name(index), str(error)))
                continue
            for size in self.sizes:
                view = self._random(index, number, full_size) if random else central_view(full_size, self.shape)
                canvas[size][len(used)] = render(pixels, view, size)
            used.append((int(self.images.ids[index]), number))
        rendered = {size: drawn[: len(used)].contiguous() for size, drawn in canvas.items()}
        ids, numbers = torch.tensor(used, dtype=torch.int64).view(-1, 2).unbind(1)
        return ids, rendered, None, tuple(skipped), numbers

    def _random(self, index: int, number: int, full_size: Size) -> View:
        identity, how = int(self.images.ids[index]), self.settings
        return random_view(self.seed, identity, number, how.scale, how.flip, full_size)


def _render_ahead(
    views: Dataset[Rendered | DataError], wanted: Iterable[NDArray[np.int64]], workers: int
) -> Iterator[Rendered]:
    """``views[item]`` for each item of ``wanted``, in order, prepared by worker processes."""
    loader: DataLoader[Rendered | DataError] = DataLoader(
        views,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each pass would draw a number from the global one
        # fork shares the index of the images and starts in milliseconds; workers use neither CUDA nor threads
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork beside threads; the workers take no lock that one of those may hold
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        rendered_ahead = iter(loader)
    try:
        for rendered in rendered_ahead:
            if isinstance(rendered, DataError):
                raise rendered
            yield rendered
    finally:
        del rendered_ahead  # ends the workers now, not when some traceback lets go of this frame


def _as_it_is(rendered: Any) -> Any:
    return rendered


def _start_worker(number: int) -> None:
    """Signals may reach the whole process group; it is the main process that decides what happens then.

    A worker ends when it is told to over its queue, or when it finds the main process gone; asked to terminate, it
    gives the main process time to save what it has.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
