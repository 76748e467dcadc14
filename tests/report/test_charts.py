"""Charts: values are at their position, and names can be read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as tree  # noqa: S405  (it parses a chart that was just made)

import pytest

from shoulders.report.charts import (
    BAR_WIDTH,
    LARGE_SIZE,
    LINE_HEIGHT,
    MAX_POINTS,
    Series,
    bar_chart,
    downsample,
    line_chart,
    nice_ticks,
    spread,
)


def parse_chart(series: list[Series], **settings: float) -> tree.Element:
    return tree.fromstring(line_chart(series, "a <chart>", **settings))  # type: ignore[arg-type]  # noqa: S314


def curve_points(chart: tree.Element, number: int) -> list[tuple[float, float]]:
    """The points of a curve in px."""
    path = [one for one in chart.iter("path") if "line" in (one.get("class") or "")][number].get("d") or ""
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", path)]


def test_points_are_in_proportion() -> None:
    points = [(0.0, 0.0), (100.0, 1.0), (200.0, 0.5), (400.0, 0.25)]
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = curve_points(
        parse_chart([Series("loss", points, "student")], low=0, high=1), 0
    )
    assert x1 - x0 == pytest.approx((x3 - x0) / 4, abs=0.2) and x2 - x0 == pytest.approx((x3 - x0) / 2, abs=0.2)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.2) and y0 > y3 > y2 > y1  # larger values are higher


def test_names_do_not_overlap_and_are_inside_the_chart() -> None:
    series = [Series(f"teacher{i}", [(0, 0.5), (10, 0.5 + i / 1000)], f"t{i}") for i in range(6)]
    names = [one for one in parse_chart(series).iter("text") if (one.get("class") or "").startswith("name")]
    heights = sorted(float(one.get("y") or 0) for one in names)
    assert len(heights) == 6
    assert all(b - a >= LINE_HEIGHT - 0.2 for a, b in zip(heights, heights[1:], strict=False))
    assert 0 < heights[0] and heights[-1] < LARGE_SIZE[1]


def test_the_label_has_the_ends_of_the_curves() -> None:
    chart = parse_chart([Series("a&b", [(0, 0.8), (5, 0.25)], "t1")])
    assert chart.get("role") == "img" and chart.get("aria-label") == "a <chart>: a&b from 0.8 to 0.25"


def test_a_curve_that_ends_above_the_axis_has_its_last_value_in_its_name() -> None:
    series = [Series("inside", [(0, 3.0), (5, 0.25)], "t1"), Series("above", [(0, 0.5), (5, 8.93)], "t2")]
    names = [one.text for one in parse_chart(series, low=0, high=1).iter("text") if "name" in (one.get("class") or "")]
    assert sorted(name or "" for name in names) == ["above ↑8.9", "inside"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.003, 0.0041), (1, 1.58), (-3, 12_345), (0.5, 0.5), (0, 0)])
def test_ticks_are_few_round_numbers_around_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_long_curves_are_downsampled_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(5000)]
    few = downsample(points)
    assert len(few) == MAX_POINTS and few[0] == points[0] and few[-1] == points[-1]
    assert all(y == pytest.approx(0.5, abs=0.05) for _, y in few[1:-1])
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert downsample(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_positions_move_as_little_as_needed() -> None:
    assert spread([10, 50], 16, 0, 100) == [10, 50]
    assert spread([90, 95, 99], 16, 0, 100) == [68, 84, 100]
    assert spread([0, 0, 0], 16, 0, 20) == [0, 16, 32]  # too little space: the distance is kept


def test_bars_are_in_proportion_and_end_at_one() -> None:
    chart = tree.fromstring(bar_chart([("teacher", 0.5), ("scratch", 1.2), ("teacher_head", 0.0)], "label"))  # noqa: S314
    track, *bars = chart.iter("rect")
    assert float(track.get("width") or 0) == BAR_WIDTH
    assert [float(bar.get("width") or 0) for bar in bars] == [BAR_WIDTH / 2, BAR_WIDTH, 0]
