"""Charts as inline SVG. Colours are classes of the page's style sheet, so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shoulders.report.markup import Html, element, text
from shoulders.report.record import Points

# all lengths are in px, at about the size at which the page shows the charts
LARGE_SIZE, SMALL_SIZE = (420, 256), (300, 190)
LEFT, TOP, BOTTOM = 38, 10, 30  # margins of the plot; the names of the curves are on the right
MIN_RIGHT = 62  # margin for the name of the horizontal axis
LETTER_WIDTH, LINE_HEIGHT = 8.6, 16  # largest width of a bold letter, and height of a name
BAR_HEIGHT, BAR_GAP, BAR_WIDTH = 7, 3, 180
MAX_POINTS = 160  # of a curve
MAX_DOTS = 12  # a curve of so few points has a dot at each
STEP_SIZES = (1, 2, 2.5, 5, 10)  # of ticks, times a power of ten


class Series(NamedTuple):
    """A curve: its name, its points, and the class that gives it colour and dashes."""

    name: str
    points: Points
    class_: str


class Frame(NamedTuple):
    """Maps values to px."""

    x: tuple[float, float]  # smallest and largest value
    y: tuple[float, float]
    right: float  # px of the right end of the plot
    bottom: float

    def to_px(self, x: float, y: float) -> tuple[float, float]:
        """The position of the point (x, y) in px."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (self.right - LEFT), self.bottom - up * (self.bottom - TOP)


def line_chart(
    series: Sequence[Series],
    label: str,
    size: tuple[int, int] = LARGE_SIZE,
    low: float | None = None,
    high: float | None = None,
) -> Html:
    """Curves over the steps, each with its name at its end.

    Args:
        series: the curves.
        label: description for screen readers; the first and the last value of each curve are added.
        size: (width, height) in px.
        low, high: ends of the vertical axis; default: the extreme values. Curves are cut off outside, and a curve that
            ends above the axis has its last value in its name.
    """
    series = [curve._replace(points=downsample(curve.points)) for curve in series if curve.points]
    xs = [x for curve in series for x, _ in curve.points]
    ys = [y for curve in series for _, y in curve.points]
    lowest, highest = min(ys) if low is None else low, max(ys) if high is None else high
    ticks = nice_ticks(lowest, highest)
    y_range = (min(ticks[0], lowest), max(ticks[-1], highest))
    names = [_name(curve, y_range[1]) for curve in series]
    width, height = size
    right = width - max(12 + LETTER_WIDTH * max(map(len, names)), MIN_RIGHT)
    frame = Frame((min(xs), max(max(xs), min(xs) + 1)), y_range, right, height - BOTTOM)
    ends = "; ".join(f"{curve.name} from {curve.points[0][1]:.3g} to {curve.points[-1][1]:.3g}" for curve in series)
    content = [*_axes(frame, ticks), *_curves(series, frame), *_names(series, names, frame)]
    return element("svg", *content, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{label}: {ends}")


def _name(curve: Series, highest: float) -> str:
    last = curve.points[-1][1]
    return curve.name if last <= highest else f"{curve.name} ↑{last:.2g}"


def _axes(frame: Frame, ticks: Sequence[float]) -> list[Html]:
    elements = []
    for tick in ticks:
        y = frame.to_px(frame.x[0], tick)[1]
        elements.append(Html(f'<path class="grid" d="M{LEFT} {y:.1f}H{frame.right:.1f}"/>'))
        elements.append(Html(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'))
    steps = [tick for tick in nice_ticks(*frame.x) if frame.x[0] <= tick <= frame.x[1] and tick == int(tick)]
    y = frame.bottom + 20
    for tick in steps:
        x = frame.to_px(tick, frame.y[0])[0]
        number = f"{tick / 1000:g}k" if tick and frame.x[1] >= 10_000 else f"{tick:g}"
        elements.append(Html(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{number}</text>'))
    elements.append(Html(f'<text class="tick" x="{frame.right + 20:.1f}" y="{y:.1f}">steps</text>'))
    return elements


def _curves(series: Sequence[Series], frame: Frame) -> list[Html]:
    """The curves, cut off at the border of the plot by a nested svg."""
    x, y, width, height = LEFT - 4, TOP - 4, frame.right - LEFT + 8, frame.bottom - TOP + 8
    elements = []
    for curve in series:
        points = [frame.to_px(*point) for point in curve.points]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        elements.append(f'<path class="line {curve.class_}" d="{path}"/>')
        if len(points) <= MAX_DOTS:
            dots = [f'<circle class="dot {curve.class_}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in points]
            elements += dots
    box = f'x="{x}" y="{y}" width="{width:.1f}" height="{height}" viewBox="{x} {y} {width:.1f} {height}"'
    return [Html(f"<svg {box}>{''.join(elements)}</svg>")]


def _names(series: Sequence[Series], names: Sequence[str], frame: Frame) -> list[Html]:
    """The names at the ends of the curves, moved apart where they would overlap."""
    ends = [frame.to_px(*curve.points[-1])[1] for curve in series]
    order = sorted(range(len(series)), key=lambda i: ends[i])
    heights = spread([min(max(ends[i], TOP), frame.bottom) for i in order], LINE_HEIGHT, TOP, frame.bottom)
    elements = []
    for i, y in zip(order, heights, strict=True):
        position = f'x="{frame.right + 8:.1f}" y="{y + 4:.1f}"'
        elements.append(Html(f'<text class="name {series[i].class_}" {position}>{text(names[i])}</text>'))
    return elements


def bar_chart(values: Sequence[tuple[str, float]], label: str) -> Html:
    """Horizontal bars for fractions from 0 to 1, one below the other.

    Args:
        values: (class that gives the colour, value) of each bar.
        label: description for screen readers.
    """
    height = len(values) * (BAR_HEIGHT + BAR_GAP) - BAR_GAP
    elements = [Html(f'<rect class="track" width="{BAR_WIDTH}" height="{height}" rx="1.5"/>')]
    for number, (class_, value) in enumerate(values):
        length = max(min(value, 1.0), 0.0) * BAR_WIDTH
        box = f'y="{number * (BAR_HEIGHT + BAR_GAP)}" width="{length:.1f}" height="{BAR_HEIGHT}"'
        elements.append(Html(f'<rect class="bar {class_}" {box} rx="1.5"/>'))
    return element(
        "svg",
        *elements,
        viewBox=f"0 0 {BAR_WIDTH} {height}",
        width=BAR_WIDTH,
        height=height,
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="bars",
    )


def downsample(points: Points) -> Points:
    """A curve of at most `MAX_POINTS` points: means of neighbours, with the first and the last point unchanged."""
    if len(points) <= MAX_POINTS:
        return points
    inner, groups = points[1:-1], MAX_POINTS - 2
    bounds = [round(i * len(inner) / groups) for i in range(groups + 1)]
    means = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        group = inner[start:end]
        means.append((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)))
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers that include the range [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in STEP_SIZES if unit * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def spread(positions: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Sorted positions, moved as little as needed to be ``distance`` apart, and inside [low, high] if possible."""
    moved: list[float] = []
    for position in positions:
        moved.append(max(position, moved[-1] + distance) if moved else max(position, low))
    limit = max(high, low + distance * (len(moved) - 1))
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - distance
    return moved
