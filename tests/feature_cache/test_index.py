"""The views of records are those of runs, pixel for pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.config.section import as_size
from shoulders.config.sections import Images
from shoulders.errors import DataError
from shoulders.feature_cache.index import RecordIndex
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


def test_each_view_has_one_record(images: ImageSet) -> None:
    index = RecordIndex(images, VIEWS)
    assert len(index) == VIEWS * len(images) + len(images.heldout)
    views = index.views_of(np.arange(len(index)))
    assert len(np.unique(views, axis=0)) == len(index)
    assert sorted(np.unique(views[:, 1])) == [CENTRAL, 0, 1, 2]
    assert index.keys(np.arange(2)) == [(int(images.collection.ids[i]), int(view)) for i, view in views[:2]]


def test_an_index_of_some_sources_has_their_images_in_the_same_order(images: ImageSet, settings: Images) -> None:
    both, two = RecordIndex(images, VIEWS), RecordIndex(images, VIEWS, ["two"])
    views = both.views_of(np.arange(len(both)))
    rows, numbers = two.select(views)
    assert [images.collection.name(index)[:3] == "two" for index, _ in views] == [i in rows for i in range(len(views))]
    assert numbers.tolist() == list(range(len(two)))
    assert two.views_of(numbers).tolist() == views[rows].tolist()
    batch = next(batches(images, SIZES, settings, batch=12, seed=5, steps=1))
    part = two.restrict(batch)
    assert 0 < len(part) < len(batch)
    expected = [key for key in both.keys(both.records_of(batch)) if key[0] in part.ids.tolist()]
    assert two.keys(two.records_of(part)) == expected
    with pytest.raises(DataError, match="an image is needed that is not in the cache"):
        two.records_of(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_listed_views_are_the_views_of_runs(workers: int, images: ImageSet, settings: Images) -> None:
    index, with_workers = RecordIndex(images, VIEWS), settings.model_copy(update={"workers": workers})
    drawn = list(batches(images, SIZES, settings, batch=8, seed=5, steps=10))
    shape = as_size(settings.size)
    drawn += list(evaluation_batches(images.collection, SIZES, 4, images.heldout, shape=shape))
    numbers = [index.records_of(batch) for batch in drawn]
    assert {int(number) for part in numbers for number in part} == set(range(len(index)))
    listed = listed_batches(images, [index.views_of(part) for part in numbers], SIZES, with_workers, seed=5)
    for one, other in zip(listed, drawn, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.views is not None and other.views is not None and torch.equal(one.views, other.views)
        assert all(torch.equal(one.rendered[size], other.rendered[size]) for size in SIZES)


def test_decode_sizes_that_are_not_rendered_decide_how_images_are_decoded(images: ImageSet, settings: Images) -> None:
    def first(sizes: list[tuple[int, int]], decode_sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        drawn = next(batches(images, sizes, settings, batch=8, seed=5, steps=1, decode_sizes=decode_sizes))
        central = next(evaluation_batches(images.collection, sizes, 2, images.heldout, decode_sizes=decode_sizes))
        return [batch.rendered[(32, 32)] for batch in (drawn, central)]

    large = (200, 200)
    rendered, decoded, without = first([(32, 32), large], []), first([(32, 32)], [large]), first([(32, 32)], [])
    assert all(torch.equal(x, y) for x, y in zip(rendered, decoded, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(rendered, without, strict=True))


def test_images_that_cannot_be_decoded_are_left_out(images: ImageSet, settings: Images, tmp_path: Path) -> None:
    Image.new("RGB", (90, 90)).save(tmp_path / "0.png")
    for i in range(1, 6):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    few = open_images(Images(path=tmp_path), seed=0)
    index = RecordIndex(few, 1)
    (batch,) = listed_batches(few, [index.views_of(np.arange(len(index)))], SIZES, Images(workers=0), seed=0)
    assert (len(batch), len(batch.skipped), batch.rendered[SIZES[1]].shape) == (1, 5, (1, 3, 48, 64))
    empty = [index.views_of(np.array([number])) for number in range(len(index))]
    assert sorted(len(one) for one in listed_batches(few, empty, SIZES, Images(workers=0), seed=0)) == [0] * 5 + [1]


def test_views_without_a_record_are_refused(images: ImageSet, settings: Images) -> None:
    batch = next(batches(images, SIZES, settings, batch=4, seed=5, steps=1))
    assert len(RecordIndex(images, 1)) < len(RecordIndex(images, VIEWS))
    with pytest.raises(DataError, match="the cache has 1 views of each image"):
        RecordIndex(images, 1).records_of(next(batches(images, SIZES, settings, batch=40, seed=5, steps=1)))
    other = RecordIndex(
        open_images(settings.model_copy(update={"sources": {"one": settings.sources["one"]}}), 5), VIEWS
    )
    with pytest.raises(DataError, match="an image is needed that is not in the cache"):
        other.records_of(next(b for b in batches(images, SIZES, settings, batch=20, seed=5, steps=1)))
    assert len(batch) == 4
