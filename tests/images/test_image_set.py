"""Held-out images, the quotas of sources, and the order of training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, ImageSet
from shoulders.images.order import permutation, quotas, stream


class NamesOnly:
    """A source with names and without pixels."""

    classes: list[str] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        raise OSError("this source has no pixels")

    def label(self, index: int) -> int | None:
        return None


def numbered(count: int) -> NamesOnly:
    return NamesOnly([f"{number}.jpg" for number in range(count)])


def image_set(holdout: int = 512, seed: int = 0, **counts: int) -> ImageSet:
    return ImageSet({name: numbered(count) for name, count in counts.items()}, {}, seed, holdout)


def heldout_names(images: ImageSet) -> set[str]:
    return {images.collection.name(index) for index in images.heldout}


@pytest.mark.parametrize(
    ("count", "holdout", "num_heldout"),
    [(10_000, 512, 512), (1000, 512, 100), (100, 512, 10), (40, 512, 8), (5, 512, 2), (2, 8, 1)],
)
def test_the_number_of_held_out_images(count: int, holdout: int, num_heldout: int) -> None:
    images = image_set(holdout, photos=count)
    assert (len(images.heldout), len(images)) == (num_heldout, count - num_heldout)


def test_the_held_out_images_do_not_depend_on_order_or_seed() -> None:
    names = [f"{number}.jpg" for number in range(300)]
    first = ImageSet({"a": NamesOnly(names)}, {}, 0, 512)
    shuffled = ImageSet({"a": NamesOnly(names[::-1])}, {}, 1, 512)
    assert heldout_names(first) == heldout_names(shuffled)


def test_held_out_images_stay_when_others_are_added() -> None:
    few = image_set(20, a=300)
    more = image_set(20, a=330)
    added = {f"{number}.jpg" for number in range(300, 330)}
    assert heldout_names(more) <= heldout_names(few) | added
    assert len(heldout_names(more) & heldout_names(few)) >= 15


def test_the_order_of_names_does_not_change_the_order_of_training() -> None:
    names = [f"{number}.jpg" for number in range(50)]
    first, other = (ImageSet({"a": NamesOnly(order)}, {}, 0, 8) for order in (names, names[::-1]))
    orders = [[(images.collection.name(i), visit) for i, visit in images.positions(0, 99)] for images in (first, other)]
    assert orders[0] == orders[1]


def test_one_source_is_the_usual_shuffled_epoch() -> None:
    images = image_set(a=200)
    training = set(range(200)) - set(images.heldout.tolist())
    orders = []
    for epoch in range(3):
        visits = images.epoch_order(epoch)
        assert set(visits[:, 0].tolist()) == training and (visits[:, 1] == epoch).all()
        orders.append(tuple(visits[:, 0]))
    assert len(set(orders)) == 3
    assert tuple(image_set(seed=1, a=200).epoch_order(0)[:, 0]) != orders[0]


def test_sources_keep_their_shares_and_visit_all_their_images_equally_often() -> None:
    images = ImageSet({"large": numbered(900), "small": numbered(100)}, {}, 0, 8)
    assert images.quotas == quotas({"large": len(images.training["large"]), "small": len(images.training["small"])}, {})
    share = images.quotas["small"] / len(images)
    assert share == pytest.approx(np.sqrt(100) / (np.sqrt(100) + np.sqrt(900)), abs=0.02)
    counts: Counter[int] = Counter()
    distinct = set()
    for epoch in range(7):
        visits = images.epoch_order(epoch)
        assert len(visits) == len(images)
        assert np.isin(visits[:, 0], images.training["small"]).sum() == images.quotas["small"]
        counts.update(visits[:, 0].tolist())
        distinct |= {tuple(visit) for visit in visits.tolist()}
    assert len(distinct) == 7 * len(images)  # no (image, visit) occurs twice
    for indices in images.training.values():
        times = [counts[index] for index in indices.tolist()]
        assert max(times) - min(times) <= 1


def test_positions_cross_epochs_and_any_range_can_be_read() -> None:
    images = image_set(a=30, b=12)
    expected = np.concatenate([images.epoch_order(epoch) for epoch in range(4)])
    assert np.array_equal(images.positions(0, len(expected)), expected)
    assert np.array_equal(images.positions(17, 70), expected[17:87])
    assert np.array_equal(images.positions(3, 2), expected[3:5])
    assert images.positions(5, 0).shape == (0, 2)


@pytest.mark.parametrize(
    ("counts", "shares", "expected"),
    [
        ({"a": 100, "b": 100}, {}, {"a": 100, "b": 100}),
        ({"a": 900, "b": 100}, {}, {"a": 750, "b": 250}),
        ({"a": 900, "b": 100}, {"b": 0.5}, {"a": 500, "b": 500}),
        ({"a": 900, "b": 100}, {"a": 3, "b": 1}, {"a": 750, "b": 250}),
        ({"a": 1, "b": 1, "c": 1}, {}, {"a": 1, "b": 1, "c": 1}),
        ({"a": 5, "b": 5}, {"a": 0.33, "b": 0.67}, {"a": 3, "b": 7}),
    ],
)
def test_quotas(counts: dict[str, int], shares: dict[str, float | None], expected: dict[str, int]) -> None:
    assert quotas(counts, shares) == expected


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(RecipeError, match="shares of a add up to 1 and leave nothing for b; lower them"):
        quotas({"a": 5, "b": 5}, {"a": 1.0})
    with pytest.raises(RecipeError, match=r"images\.sources\.b: its share is below one image per epoch"):
        quotas({"a": 5, "b": 5}, {"b": 0.01})


def test_permutations_and_streams() -> None:
    assert permutation(10, 0, "x").tolist() == [4, 6, 2, 9, 8, 3, 5, 1, 7, 0]
    assert sorted(permutation(1000, 1)) == list(range(1000))
    expected = stream(0, 50, 7, "key")
    assert np.array_equal(stream(10, 23, 7, "key"), expected[10:33])
    assert expected[:, 1].tolist() == [position // 7 for position in range(50)]


def test_replacements_are_training_images_of_the_same_source() -> None:
    images = image_set(a=100, b=50)
    bad = int(images.training["b"][3])
    candidates = images.replacements(bad)
    assert candidates == images.replacements(bad) == image_set(seed=5, a=100, b=50).replacements(bad)
    assert set(candidates) <= set(images.training["b"].tolist()) and len(set(candidates)) > 10


def test_images_of_several_sources_have_different_names_and_ids() -> None:
    images = Collection({"a": numbered(3), "b": numbered(3)})
    assert [images.name(index) for index in range(6)] == [
        "a/0.jpg",
        "a/1.jpg",
        "a/2.jpg",
        "b/0.jpg",
        "b/1.jpg",
        "b/2.jpg",
    ]
    assert len(set(images.ids.tolist())) == 6
    assert images.labels is None


def test_too_few_images_or_duplicate_names_are_refused() -> None:
    with pytest.raises(DataError, match="only one image"):
        image_set(a=1)
    with pytest.raises(DataError, match=r"'x\.jpg': two images have this name"):
        Collection({"a": NamesOnly(["x.jpg", "y.jpg", "x.jpg"])})
