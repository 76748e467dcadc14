"""Charts as inline SVG. Colours are classes of the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shoulders.report.gather import Points
from shoulders.report.markup import Html, element, text

LARGE, SMALL = (420, 256), (300, 190)  # px, about as they are shown
LEFT, TOP, BOTTOM = 38, 10, 30  # px around the plot; on the right stand the names
LETTER, LINE = 8.6, 16  # px that a bold letter is wide at most and a name is high, at the page's 13 px
MOST = 160  # points of a curve that can be told apart
STEPS = 62  # px that the name of the horizontal axis takes at the right
FEW = 12  # up to here each point gets a dot


class Series(NamedTuple):
    """A curve: its name, its points, and the class that gives it colour and dash."""

    name: str
    points: Points
    class_: str


class Frame(NamedTuple):
    """Where values lie in px."""

    x: tuple[float, float]
    y: tuple[float, float]
    right: float  # px at which the plot ends
    bottom: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """(x, y) in px of the chart."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (self.right - LEFT), self.bottom - up * (self.bottom - TOP)


def line_chart(
    series: Sequence[Series],
    label: str,
    size: tuple[int, int] = LARGE,
    low: float | None = None,
    high: float | None = None,
    top: float | None = None,
) -> Html:
    """Curves over steps, each named where it ends.

    Args:
        label: what is to be seen, for those who cannot; the first and last value of each curve are added.
        size: (width, height) in px.
        low, high: ends of the vertical axis; default: those of the values.
        top: values above are cut off.
    """
    series = [curve._replace(points=thin(curve.points)) for curve in series if curve.points]
    xs = [x for curve in series for x, _ in curve.points]
    ys = [y if top is None else min(y, top) for curve in series for _, y in curve.points]
    least, most = min(ys) if low is None else low, max(ys) if high is None else high
    ticks = nice_ticks(least, most)
    w, h = size
    right = w - max(12 + LETTER * max(len(curve.name) for curve in series), STEPS)
    ends_of_x = (min(xs), max(max(xs), min(xs) + 1))
    frame = Frame(ends_of_x, (min(ticks[0], least), max(ticks[-1], most)), right, h - BOTTOM)
    ends = "; ".join(f"{curve.name} from {curve.points[0][1]:.3g} to {curve.points[-1][1]:.3g}" for curve in series)
    inside = [*_axes(frame, ticks), *_curves(series, frame), *_names(series, frame)]
    return element("svg", *inside, viewBox=f"0 0 {w} {h}", role="img", aria_label=f"{label}: {ends}")


def _axes(frame: Frame, ticks: Sequence[float]) -> list[Html]:
    drawn = []
    for tick in ticks:
        y = frame.at(frame.x[0], tick)[1]
        drawn.append(Html(f'<path class="grid" d="M{LEFT} {y:.1f}H{frame.right:.1f}"/>'))
        drawn.append(Html(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'))
    steps = [tick for tick in nice_ticks(*frame.x) if frame.x[0] <= tick <= frame.x[1] and tick == int(tick)]
    y = frame.bottom + 20
    for tick in steps:
        x = frame.at(tick, frame.y[0])[0]
        words = f"{tick / 1000:g}k" if tick and frame.x[1] >= 10_000 else f"{tick:g}"
        drawn.append(Html(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{words}</text>'))
    drawn.append(Html(f'<text class="tick" x="{frame.right + 20:.1f}" y="{y:.1f}">steps</text>'))
    return drawn


def _curves(series: Sequence[Series], frame: Frame) -> list[Html]:
    """The curves, cut off where they leave the plot: a nested svg shows nothing outside of itself."""
    x, y, w, h = LEFT - 4, TOP - 4, frame.right - LEFT + 8, frame.bottom - TOP + 8
    drawn = []
    for curve in series:
        places = [frame.at(*point) for point in curve.points]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        drawn.append(f'<path class="line {curve.class_}" d="{path}"/>')
        if len(places) <= FEW:
            drawn += [f'<circle class="dot {curve.class_}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in places]
    box = f'x="{x}" y="{y}" width="{w:.1f}" height="{h}" viewBox="{x} {y} {w:.1f} {h}"'
    return [Html(f"<svg {box}>{''.join(drawn)}</svg>")]


def _names(series: Sequence[Series], frame: Frame) -> list[Html]:
    """The names at the right ends, moved apart where they would lie on each other."""
    ends = [frame.at(*curve.points[-1])[1] for curve in series]
    order = sorted(range(len(series)), key=lambda i: ends[i])
    heights = apart([min(max(ends[i], TOP), frame.bottom) for i in order], LINE, TOP, frame.bottom)
    drawn = []
    for i, y in zip(order, heights, strict=True):
        place = f'x="{frame.right + 8:.1f}" y="{y + 4:.1f}"'
        drawn.append(Html(f'<text class="name {series[i].class_}" {place}>{text(series[i].name)}</text>'))
    return drawn


def bars(values: Sequence[tuple[str, float]], label: str) -> Html:
    """Bars of fractions from 0 to 1 under each other, on a common track.

    Args:
        values: (class that gives the colour, value).
    """
    thick, gap, width = 7, 3, 180
    height = len(values) * (thick + gap) - gap
    drawn = [Html(f'<rect class="track" width="{width}" height="{height}" rx="1.5"/>')]
    for number, (class_, value) in enumerate(values):
        box = f'y="{number * (thick + gap)}" width="{max(min(value, 1.0), 0.0) * width:.1f}" height="{thick}"'
        drawn.append(Html(f'<rect class="bar {class_}" {box} rx="1.5"/>'))
    return element(
        "svg",
        *drawn,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="bars",
    )


def thin(points: Points) -> Points:
    """A curve of at most `MOST` points: the means of neighbours, the first and the last point as they are."""
    if len(points) <= MOST:
        return points
    inner, parts = points[1:-1], MOST - 2
    cuts = [round(i * len(inner) / parts) for i in range(parts + 1)]
    means = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        few = inner[start:end]
        means.append((sum(x for x, _ in few) / len(few), sum(y for _, y in few) / len(few)))
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Sorted places, moved as little as needed to lie `least` apart, and inside [low, high] if there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least) if moved else max(place, low))
    ceiling = max(high, low + least * (len(moved) - 1))
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - least
    return moved
