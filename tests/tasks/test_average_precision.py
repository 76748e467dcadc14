"""Average precision of a few boxes, counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoulders.tasks.average_precision import METRICS, Detections, average_precision, interval, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations

SIDE = 300


def truth(*images: list[list[float]], classes: tuple[str, ...] = ("cat",), kind: int = 0) -> Annotations:
    """Objects of class number ``kind`` with these boxes, per image."""
    described = []
    for number, boxes in enumerate(images):
        corners = np.array(boxes, dtype=float).reshape(-1, 4)
        areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        count = len(corners)
        described.append(
            AnnotatedImage(f"{number}.png", (SIDE, SIDE), np.full(count, kind), corners, areas, np.zeros(count, bool))
        )
    return Annotations(classes, tuple(described))


def detections(boxes: list[list[float]], scores: list[float], kind: int = 0) -> Detections:
    return Detections(np.full(len(boxes), kind), np.array(scores, dtype=float), np.array(boxes, float).reshape(-1, 4))


def test_two_of_three_detections_by_hand() -> None:
    """Scores .9, .8, .7: IoU .82 with the first object, no object, IoU .62 with the second; areas of 40 x 50 px.

    Precision is 1 up to recall .5, that is at 51 of the 101 recalls, and 2/3 above, while the third one counts.
    """
    objects = truth([[0, 0, 40, 50], [100, 100, 140, 150]])
    found = detections([[0, 0, 40, 41], [200, 200, 240, 250], [100, 100, 140, 131]], [0.9, 0.8, 0.7])
    both, first = (51 + 50 * 2 / 3) / 101, 51 / 101
    mean = (3 * both + 4 * first) / 10  # thresholds .50 to .60, .65 to .80; none from .85 on
    expected = dict.fromkeys(METRICS, math.nan) | {"AP": mean, "AP50": both, "AP75": first, "AP_medium": mean}
    assert average_precision(match(objects, [found])) == pytest.approx(expected, nan_ok=True, abs=1e-9)


@pytest.mark.parametrize(("side", "name"), [(31, "AP_small"), (33, "AP_medium"), (95, "AP_medium"), (97, "AP_large")])
def test_objects_have_the_size_of_their_area(side: float, name: str) -> None:
    box = [10.0, 10.0, 10 + side, 10 + side]
    scores = average_precision(match(truth([box]), [detections([box], [0.5])]))
    assert {metric for metric, value in scores.items() if value == pytest.approx(1)} == {"AP", "AP50", "AP75", name}
    assert sum(map(math.isnan, scores.values())) == 2


def test_classes_count_the_same_and_those_without_objects_not_at_all() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    one, other = truth([box, box], classes=("a", "b", "c")).images[0], truth([box], kind=2).images[0]
    objects = Annotations(("a", "b", "c"), (one, other))
    found = [detections([box, box], [0.9, 0.8]), detections([box], [0.9], kind=1)]
    assert average_precision(match(objects, found))["AP"] == pytest.approx(0.5)  # a: 1, c: 0


@pytest.mark.parametrize(("rank", "expected"), [(100, 0.01), (101, 0.0)])
def test_a_hundred_detections_of_an_image_and_class_count(rank: int, expected: float) -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    wrong = [[100.0, 100.0, 140.0, 140.0]] * (rank - 1)
    found = detections([*wrong, box], list(np.linspace(1, 0.1, rank)))
    assert average_precision(match(truth([box]), [found]))["AP"] == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_images_that_are_all_right_or_all_wrong() -> None:
    """One detection for one object in each image, right in the 3 of 10 with the highest scores: AP is the recall."""
    box, wrong = [10.0, 10.0, 50.0, 50.0], [100.0, 100.0, 140.0, 140.0]
    objects = truth(*[[box]] * 10)
    found = [detections([box if number < 3 else wrong], [0.9 - 0.01 * number]) for number in range(10)]
    matches = match(objects, found)
    generator = np.random.default_rng(0)
    # hits have the higher scores: precision is 1 up to the recall that is reached
    hits = [int((generator.integers(10, size=10) < 3).sum()) for _ in range(200)]
    values = [sum(step <= 10 * count for step in range(101)) / 101 if count else 0.0 for count in hits]
    for level in (0.95, 0.5):
        expected = tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
        assert interval(matches, 200, 0, level) == pytest.approx(expected, abs=1e-9)


def test_an_interval_is_of_200_draws_with_seed_0_at_the_level_of_95_percent() -> None:
    objects = truth(*[[[0.0, 0.0, 100.0, 50.0]]] * 12)
    found = [detections([[0, 0, 100, 21 + 2 * number]], [0.5 + number % 5 / 10]) for number in range(12)]
    matches = match(objects, found)
    assert interval(matches) == interval(matches, 200, 0, 0.95)
    for others in ((201, 0, 0.95), (200, 1, 0.95), (200, 0, 0.9)):
        assert interval(matches) != interval(matches, *others)
