"""Charts: values lie where they belong, and names can be read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as tree  # noqa: S405  (it reads what we have just written)

import pytest

from shoulders.report.charts import LARGE, LINE, MOST, Series, apart, bars, line_chart, nice_ticks, thin


def drawn(series: list[Series], **settings: float) -> tree.Element:
    return tree.fromstring(line_chart(series, "a <chart>", **settings))  # type: ignore[arg-type]  # noqa: S314


def places(chart: tree.Element, number: int) -> list[tuple[float, float]]:
    """The points of a curve in px."""
    path = [one for one in chart.iter("path") if "line" in (one.get("class") or "")][number].get("d") or ""
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", path)]


def test_points_lie_in_proportion() -> None:
    points = [(0.0, 0.0), (100.0, 1.0), (200.0, 0.5), (400.0, 0.25)]
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = places(drawn([Series("loss", points, "student")], low=0, high=1), 0)
    assert x1 - x0 == pytest.approx((x3 - x0) / 4, abs=0.2) and x2 - x0 == pytest.approx((x3 - x0) / 2, abs=0.2)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.2) and y0 > y3 > y2 > y1  # up is larger


def test_names_stand_apart_and_inside() -> None:
    series = [Series(f"teacher{i}", [(0, 0.5), (10, 0.5 + i / 1000)], f"t{i}") for i in range(6)]
    names = [one for one in drawn(series).iter("text") if (one.get("class") or "").startswith("name")]
    heights = sorted(float(one.get("y") or 0) for one in names)
    assert len(heights) == 6
    assert all(b - a >= LINE - 0.2 for a, b in zip(heights, heights[1:], strict=False))
    assert 0 < heights[0] and heights[-1] < LARGE[1]


def test_who_cannot_see_is_told_the_ends() -> None:
    chart = drawn([Series("a&b", [(0, 0.8), (5, 0.25)], "t1")])
    assert chart.get("role") == "img" and chart.get("aria-label") == "a <chart>: a&b from 0.8 to 0.25"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.003, 0.0041), (1, 1.58), (-3, 12_345), (0.5, 0.5), (0, 0)])
def test_ticks_are_few_and_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_long_curves_are_thinned_to_their_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(5000)]
    few = thin(points)
    assert len(few) == MOST and few[0] == points[0] and few[-1] == points[-1]
    assert all(y == pytest.approx(0.5, abs=0.05) for _, y in few[1:-1])
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert thin(points[:MOST]) == points[:MOST]


def test_places_move_as_little_as_needed() -> None:
    assert apart([10, 50], 16, 0, 100) == [10, 50]
    assert apart([90, 95, 99], 16, 0, 100) == [68, 84, 100]
    assert apart([0, 0, 0], 16, 0, 20) == [0, 16, 32]  # no room: apart all the same


def test_bars_are_as_long_as_their_values() -> None:
    chart = tree.fromstring(bars([("teacher", 0.5), ("scratch", 1.2), ("inherited", 0.0)], "said"))  # noqa: S314
    track, *each = chart.iter("rect")
    whole = float(track.get("width") or 0)
    assert [float(one.get("width") or 0) for one in each] == [whole / 2, whole, 0]
