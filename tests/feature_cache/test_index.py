"""Records hold the views that runs draw, pixel for pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.config.recipe import Images, as_size
from shoulders.errors import DataError
from shoulders.feature_cache.index import Index
from shoulders.features import CENTRAL
from shoulders.images import ImageSet, batches, evaluation_batches, listed_batches, open_images

SIZES = [(32, 32), (48, 64)]
VIEWS = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Images:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for source, count in (("one", 14), ("two", 7)):
        (root / source).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((500, 400)).save(root / source / f"{i}.jpg")
    sources: Any = {name: {"path": root / name} for name in ("one", "two")}
    return Images(sources=sources, size=32, views=VIEWS, workers=0)


@pytest.fixture(scope="module")
def images(settings: Images) -> ImageSet:
    return open_images(settings, seed=5)


def test_every_record_is_asked_for_by_what_it_holds(images: ImageSet) -> None:
    index = Index(images, VIEWS)
    assert len(index) == VIEWS * len(images) + len(images.heldout)
    wanted = index.wanted(np.arange(len(index)))
    assert len(np.unique(wanted, axis=0)) == len(index)
    assert sorted(np.unique(wanted[:, 1])) == [CENTRAL, 0, 1, 2]
    assert index.keys(np.arange(2)) == [(int(images.collection.ids[i]), int(view)) for i, view in wanted[:2]]


def test_of_some_sources_it_numbers_their_images_alone_in_the_same_order(images: ImageSet, settings: Images) -> None:
    every, two = Index(images, VIEWS), Index(images, VIEWS, ["two"])
    wanted = every.wanted(np.arange(len(every)))
    rows, numbers = two.counting(wanted)
    assert [images.collection.name(index)[:3] == "two" for index, _ in wanted] == [
        i in rows for i in range(len(wanted))
    ]
    assert numbers.tolist() == list(range(len(two)))
    assert two.wanted(numbers).tolist() == wanted[rows].tolist()
    batch = next(batches(images, SIZES, settings, batch=12, seed=5, steps=1))
    theirs = two.among(batch)
    assert 0 < len(theirs) < len(batch) and two.keys(two.of(theirs)) == [
        key for key in every.keys(every.of(batch)) if key[0] in theirs.ids.tolist()
    ]
    with pytest.raises(DataError, match="not among those it was made of"):
        two.of(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_listed_views_are_those_of_runs(workers: int, images: ImageSet, settings: Images) -> None:
    index, how = Index(images, VIEWS), settings.model_copy(update={"workers": workers})
    seen = list(batches(images, SIZES, settings, batch=8, seed=5, steps=10))
    shape = as_size(settings.size)
    seen += list(evaluation_batches(images.collection, SIZES, 4, images.heldout, shape=shape))
    numbers = [index.of(batch) for batch in seen]
    assert {int(number) for part in numbers for number in part} == set(range(len(index)))
    listed = listed_batches(images, [index.wanted(part) for part in numbers], SIZES, how, seed=5)
    for ours, theirs in zip(listed, seen, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert ours.views is not None and theirs.views is not None and torch.equal(ours.views, theirs.views)
        assert all(torch.equal(ours.rendered[size], theirs.rendered[size]) for size in SIZES)


def test_sizes_that_are_not_drawn_still_decide_how_images_are_decoded(images: ImageSet, settings: Images) -> None:
    def first(sizes: list[tuple[int, int]], decode_sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        drawn = next(batches(images, sizes, settings, batch=8, seed=5, steps=1, decode_sizes=decode_sizes))
        central = next(evaluation_batches(images.collection, sizes, 2, images.heldout, decode_sizes=decode_sizes))
        return [batch.rendered[(32, 32)] for batch in (drawn, central)]

    large = (200, 200)
    both, alone, as_if = first([(32, 32), large], []), first([(32, 32)], []), first([(32, 32)], [large])
    assert all(torch.equal(x, y) for x, y in zip(both, as_if, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(both, alone, strict=True))


def test_images_that_cannot_be_decoded_are_left_out(images: ImageSet, settings: Images, tmp_path: Path) -> None:
    Image.new("RGB", (90, 90)).save(tmp_path / "0.png")
    for i in range(1, 6):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    few = open_images(Images(path=tmp_path), seed=0)
    index = Index(few, 1)
    (batch,) = listed_batches(few, [index.wanted(np.arange(len(index)))], SIZES, Images(workers=0), seed=0)
    assert (len(batch), len(batch.skipped), batch.rendered[SIZES[1]].shape) == (1, 5, (1, 3, 48, 64))
    empty = [index.wanted(np.array([number])) for number in range(len(index))]
    assert sorted(len(one) for one in listed_batches(few, empty, SIZES, Images(workers=0), seed=0)) == [0] * 5 + [1]


def test_what_no_record_holds_is_refused(images: ImageSet, settings: Images) -> None:
    batch = next(batches(images, SIZES, settings, batch=4, seed=5, steps=1))
    assert len(Index(images, 1)) < len(Index(images, VIEWS))
    with pytest.raises(DataError, match="only 1 of each image"):
        Index(images, 1).of(next(batches(images, SIZES, settings, batch=40, seed=5, steps=1)))
    other = Index(open_images(settings.model_copy(update={"sources": {"one": settings.sources["one"]}}), 5), VIEWS)
    with pytest.raises(DataError, match="not among those it was made of"):
        other.of(next(b for b in batches(images, SIZES, settings, batch=20, seed=5, steps=1)))
    assert len(batch) == 4
