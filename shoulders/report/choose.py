"""The images of a page: chosen by their ids, which are hashes of their names, and never by a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shoulders.config.recipe import Recipe
from shoulders.errors import ShouldersError
from shoulders.images import MAX_PIXELS, Collection, ImageSource, Undecodable, open_images, open_source
from shoulders.report.record import RunRecord
from shoulders.tasks import TASKS

FEATURE_IMAGES = 4  # images whose features are drawn
MAX_PREDICTION_IMAGES = 8  # images with predictions, of all heads together
MAX_IMAGES_PER_HEAD = 4

GivenImages = ImageSource | Mapping[str, ImageSource] | None  # for all heads, or by name of the head
Selection = tuple[Collection, NDArray[np.int64]]  # indices of images in a collection


@dataclass(frozen=True)
class ShownImages:
    """The images of a page.

    Args:
        features: pixels (3, H, W) uint8 of the images whose features are drawn.
        predictions: {head: [(name, pixels (3, H, W) uint8)]} of the images with predictions.
        notes: a sentence for each thing that is missing.
    """

    features: list[Tensor]
    predictions: dict[str, list[tuple[str, Tensor]]]
    notes: list[str]


def choose_images(record: RunRecord, heads: Sequence[str], given: GivenImages) -> ShownImages:
    """Choose the images for the features and for the predictions of each head.

    Args:
        record: the run.
        heads: names of the heads.
        given: images of the caller. Default: the test images that a head was evaluated on, if they still exist, else
            held-out images of the run.
    """
    notes: list[str] = []
    by_head = given if isinstance(given, Mapping) else {}
    for_all = None if given is None or isinstance(given, Mapping) else given
    needed = max(FEATURE_IMAGES, MAX_PREDICTION_IMAGES)
    shared = _select_heldout(record.recipe, needed, notes) if for_all is None else _select_first(for_all, needed)
    per_head = min(MAX_IMAGES_PER_HEAD, max(1, MAX_PREDICTION_IMAGES // max(len(heads), 1)))
    predictions = {}
    for number, head in enumerate(heads[:MAX_PREDICTION_IMAGES]):
        source = by_head.get(head) or (_open_evaluated(record, head) if for_all is None else None)
        # heads that share a source have different images of it, as long as there are enough
        selection = _select_first(source, per_head) if source is not None else _rotate(shared, number * per_head)
        if selection is not None:
            predictions[head] = list(_decode(selection[0], selection[1][:per_head], notes))
    features = [] if shared is None else list(_decode(shared[0], shared[1][:FEATURE_IMAGES], notes))
    return ShownImages([pixels for _, pixels in features], predictions, notes)


def _select_first(source: ImageSource, count: int) -> Selection:
    """The images with the lowest ids."""
    collection = Collection({"images": source})
    return collection, np.argsort(collection.ids, kind="stable")[:count]


def _rotate(selection: Selection | None, offset: int) -> Selection | None:
    return None if selection is None else (selection[0], np.roll(selection[1], -offset))


def _select_heldout(recipe: Recipe | None, count: int, notes: list[str]) -> Selection | None:
    if recipe is None:
        return None
    try:
        images = open_images(recipe.images, recipe.train.seed)
    except (ShouldersError, OSError) as error:
        notes.append(f"The images of the recipe could not be opened ({error}).")
        return None
    return images.collection, _alternate_sources(images.collection, images.heldout)[:count]


def _alternate_sources(images: Collection, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices in an order in which the sources take turns, so that a large source does not displace the others."""
    source = np.searchsorted(images.ends, indices, side="right")
    rank = np.zeros(len(indices), np.int64)  # of an image among those of its source
    for number in np.unique(source):
        rank[source == number] = np.arange((source == number).sum())
    return indices[np.lexsort((source, rank))]


def _open_evaluated(record: RunRecord, head: str) -> ImageSource | None:
    """The test images that a head was last evaluated on, if they still exist."""
    evaluated = [row for row in record.results if row.get("head") == head and row.get("data")]
    for row in reversed(evaluated):
        patterns = TASKS[row["task"]].image_paths if row.get("task") in TASKS else ()
        for split in ("test", "val"):
            for path in (Path(row["data"]) / pattern.format(split=split) for pattern in patterns):
                try:
                    if path.exists():
                        return open_source(path)
                except (ShouldersError, OSError):
                    continue
    return None


def _decode(collection: Collection, indices: NDArray[np.int64], notes: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and pixels (3, H, W) uint8 of the images that can be decoded."""
    for index in indices.tolist():
        try:
            yield collection.name(index), collection.pixels(index, MAX_PIXELS, None)[0]
        except Undecodable as error:
            notes.append(f"{collection.name(index)} could not be decoded ({error}).")
