"""Batches of rendered views: in an endless random order for training, in a fixed order for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shoulders.config import sections
from shoulders.errors import DataError, RecipeError
from shoulders.features import Batch, Skipped
from shoulders.images.decode import MAX_PIXELS
from shoulders.images.image_set import Collection, ImageSet
from shoulders.images.view_datasets import CentralViews, ListedViews, Rendered, Size, TrainingViews
from shoulders.images.workers import prefetch


def batches(
    image_set: ImageSet,
    sizes: list[Size],
    settings: sections.Images,
    *,
    batch: int,
    seed: int,
    steps: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    decode_sizes: Sequence[Size] = (),
) -> Generator[Batch, None, None]:
    """The training batches of one rank for the steps [first_step, first_step + steps).

    The batches depend neither on the number of workers nor on the step at which a run resumed. Step s consists of the
    positions [s * batch, (s + 1) * batch) in the order of `ImageSet`, and each rank gets a contiguous slice of them.
    An image that cannot be decoded is replaced by another one of its source and listed in ``Batch.skipped``. JPEG
    files are decoded no larger than the largest size needs, so the pixels depend a little on the largest size.

    Args:
        image_set: the images.
        sizes: every (h, w) in px at which the batch is rendered.
        settings: views, scale, flip, max_pixels and workers are used.
        batch: images per step over all ranks.
        seed: of the views.
        steps: number of batches.
        first_step: step of the first batch.
        rank: of this process.
        world_size: number of processes.
        decode_sizes: further sizes that images are decoded for, but not rendered at.

    Raises:
        RecipeError: batch is not divisible by world_size.
        DataError: neither an image nor any of its `NUM_REPLACEMENTS` replacements can be decoded.
    """
    if batch % world_size:
        raise RecipeError(
            f"train.batch={batch} cannot be divided among {world_size} ranks; make it a multiple of {world_size}"
        )
    batch_per_rank = batch // world_size

    def positions() -> Iterator[NDArray[np.int64]]:
        for step in range(first_step, first_step + steps):
            yield image_set.positions(step * batch + rank * batch_per_rank, batch_per_rank)

    views = TrainingViews(image_set, sizes, settings, seed, [*sizes, *decode_sizes])
    for rendered in prefetch(views, positions(), settings.workers):
        yield _to_batch(rendered, image_set.collection)


def evaluation_batches(
    images: Collection,
    sizes: list[Size],
    batch: int,
    indices: NDArray[np.int64] | None = None,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    decode_sizes: Sequence[Size] = (),
    shape: Size | None = None,
) -> Iterator[Batch]:
    """Central views of images in order, with labels if ``images`` has them (-1 for an image without one).

    Images that cannot be decoded are left out and listed in ``Batch.skipped``, so a batch may be smaller.

    Args:
        images: all images of one or more sources.
        sizes: every (h, w) in px at which the batch is rendered.
        batch: images per batch.
        indices: which images, (n,); default: all. For the held-out ones: ``image_set.heldout``.
        workers: number of processes that decode.
        max_pixels: images of more pixels are skipped.
        decode_sizes: as in `batches`.
        shape: (h, w); all sizes show one view of this aspect ratio, as in training. Default: each size shows a view
            of its own aspect ratio.

    Raises:
        DataError: no image can be decoded.
    """
    selected = np.arange(len(images)) if indices is None else indices
    parts = (selected[start : start + batch] for start in range(0, len(selected), batch))
    ready: Batch | None = None
    skipped: tuple[Skipped, ...] = ()
    # one batch is always held back, so that the skipped images of an empty batch can go with one that is not empty
    views = CentralViews(images, sizes, max_pixels, [*sizes, *decode_sizes], shape)
    for rendered in prefetch(views, parts, workers):
        current = _to_batch(rendered, images)
        if len(current) == 0:
            skipped += current.skipped
            continue
        if ready is not None:
            yield ready
        ready = dataclasses.replace(current, skipped=skipped + current.skipped)
        skipped = ()
    if ready is None:
        raise DataError(f"none of {len(selected)} images could be decoded; the first: {skipped[:1]}")
    yield dataclasses.replace(ready, skipped=ready.skipped + skipped)


def listed_batches(
    image_set: ImageSet,
    views: Iterable[NDArray[np.int64]],
    sizes: list[Size],
    settings: sections.Images,
    seed: int,
) -> Iterator[Batch]:
    """Batches of the listed views, with the same pixels as in `batches` and `evaluation_batches`.

    Images that cannot be decoded are left out and listed in ``Batch.skipped``, so a batch may be smaller or empty.

    Args:
        image_set: the images.
        views: for each batch (B, 2): index of the image, and number of the view or `CENTRAL`.
        sizes: every (h, w) in px at which the batch is rendered.
        settings: as in `batches`.
        seed: as in `batches`.
    """
    for rendered in prefetch(ListedViews(image_set, sizes, settings, seed), views, settings.workers):
        yield _to_batch(rendered, image_set.collection)


def _to_batch(rendered: Rendered, images: Collection) -> Batch:
    """The five fields as a Batch; pinning memory turns tuples into lists."""
    ids, pixels, labels, skipped, views = rendered
    sources = torch.from_numpy(images.source_of(ids.numpy()))
    return Batch(ids, pixels, labels, tuple(skipped), views, sources)
