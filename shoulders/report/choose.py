"""Which images a page shows: chosen by their ids, which are hashes, never by what a model says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shoulders.config.recipe import Recipe
from shoulders.errors import ShouldersError
from shoulders.images import Collection, ImageSource, Undecodable, open_images, open_source
from shoulders.report.gather import Told

MAPS = 4  # images whose features are shown
MOST, MOST_OF_A_HEAD = 8, 4  # that heads answer
MAX_PIXELS = 50_000_000

Given = ImageSource | Mapping[str, ImageSource] | None
Some = tuple[Collection, NDArray[np.int64]]  # some of the images of a collection


@dataclass(frozen=True)
class Asked:
    """The images that a page shows.

    Args:
        maps: pixels (3, H, W) uint8 of those whose features are drawn.
        heads: by head, the name and the pixels (3, H, W) uint8 of those that it answers.
        notes: what is missing, in a sentence each.
    """

    maps: list[Tensor]
    heads: dict[str, list[tuple[str, Tensor]]]
    notes: list[str]


def choose(told: Told, heads: Sequence[str], given: Given) -> Asked:
    """The images for the features and for each head.

    Args:
        given: for all of them, or by name of the head; what is not given is the test images that a head was scored
            on, where they still lie there, else held-out images of the run.
    """
    notes: list[str] = []
    of_heads = given if isinstance(given, Mapping) else {}
    one = None if given is None or isinstance(given, Mapping) else given
    shared = _held_out(told.recipe, notes) if one is None else _first(one, max(MAPS, MOST))
    amount = min(MOST_OF_A_HEAD, max(1, MOST // max(len(heads), 1)))
    chosen = {}
    for number, name in enumerate(heads[:MOST]):
        source = of_heads.get(name) or (_scored_on(told, name) if one is None else None)
        # heads that share a source show different images of it, as long as there are any
        some = _first(source, amount) if source is not None else _turned(shared, number * amount)
        if some is not None:
            chosen[name] = list(_decoded(some[0], some[1][:amount], notes))
    maps = [] if shared is None else [pixels for _, pixels in _decoded(shared[0], shared[1][:MAPS], notes)]
    return Asked(maps, chosen, notes)


def _first(source: ImageSource, amount: int) -> Some:
    """The images with the lowest ids."""
    collection = Collection({"images": source})
    return collection, np.argsort(collection.ids, kind="stable")[:amount]


def _turned(some: Some | None, by: int) -> Some | None:
    return None if some is None else (some[0], np.roll(some[1], -by))


def _held_out(recipe: Recipe | None, notes: list[str]) -> Some | None:
    if recipe is None:
        return None
    try:
        found = open_images(recipe.images, recipe.train.seed)
    except (ShouldersError, OSError) as error:
        notes.append(f"The images of the recipe are not here ({error}).")
        return None
    return found.collection, _in_turn(found.collection, found.heldout)[: max(MAPS, MOST)]


def _in_turn(images: Collection, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices with the sources taking turns, so that a large one does not hide the others."""
    source = np.searchsorted(images.ends, indices, side="right")
    place = np.zeros(len(indices), np.int64)  # of an image among those of its source
    for number in np.unique(source):
        place[source == number] = np.arange((source == number).sum())
    return indices[np.lexsort((source, place))]


def _scored_on(told: Told, head: str) -> ImageSource | None:
    """The test images that a head was last scored on, where they still lie there."""
    places = [row["data"] for row in told.kept if row.get("head") == head and row.get("data")]
    for place in map(Path, reversed(places)):
        for split in ("test", "val"):
            for path in (place / "images" / split, place / split, place / f"{split}.parquet", place / f"{split}.tar"):
                try:
                    if path.exists():
                        return open_source(path)
                except (ShouldersError, OSError):
                    continue
    return None


def _decoded(collection: Collection, indices: NDArray[np.int64], notes: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and whole images (3, H, W) uint8, of those that can be read."""
    for at in indices.tolist():
        try:
            yield collection.name(at), collection.pixels(at, MAX_PIXELS, None)[0]
        except Undecodable as error:
            notes.append(f"{collection.name(at)} cannot be shown ({error}).")
