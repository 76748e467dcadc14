"""Pieces of HTML, and numbers as text. All text that comes from a run is escaped in this module."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Html(str):
    """Text that is markup already; all other text is escaped."""


class Image(NamedTuple):
    """A picture inside the page.

    Args:
        uri: a ``data:`` URI.
        alt: description for screen readers.
        size: (width, height) in px.
    """

    uri: str
    alt: str
    size: tuple[int, int]


def text(value: object) -> Html:
    """A value as text that is safe inside an element or a quoted attribute."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``; ``class_`` and ``aria_label`` are the attributes class and aria-label."""
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value != ""
    )
    return Html(f"<{name}{attribute_text}>{''.join(map(text, children))}</{name}>")


def image(picture: Image, class_: str = "") -> Html:
    """An ``<img>`` with its size, so that the page does not jump while it is decoded."""
    width, height = picture.size
    class_text = f' class="{text(class_)}"' if class_ else ""
    size = f'width="{width}" height="{height}"'
    return Html(f'<img{class_text} src="{picture.uri}" alt="{text(picture.alt)}" {size} decoding="async">')


def section(name: str, title: str, *children: object) -> Html:
    """A section of the page with its heading; ``#name`` is a link to it."""
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def figure(content: Html, title: object, caption: object = "", **attributes: object) -> Html:
    """Pictures or a chart, below a title and a caption."""
    return element("figure", element("figcaption", element("strong", title), " ", caption), content, **attributes)


def paragraph(*children: object, class_: str = "") -> Html:
    """A paragraph."""
    return element("p", *children, class_=class_)


def missing(sentence: str, command: str) -> Html:
    """A note about data that a run does not have: a sentence, and the command that produces the data."""
    return paragraph(sentence, " ", element("code", command), class_="missing")


def table(caption: str, titles: Sequence[object], rows: Iterable[Sequence[object]], class_: str = "") -> Html:
    """A table that scrolls in its own box if it is too wide; the first cell of each row is its header."""
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = [element("tr", element("th", row[0], scope="row"), *map(_as_cell, row[1:])) for row in rows]
    content = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", content, class_=f"scroll {class_}".strip(), role="region", aria_label=caption, tabindex="0")


def _as_cell(cell: object) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else element("td", cell)


def list_text(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def number_word(number: int) -> str:
    """A small number as a word, a large one as digits."""
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else str(number)


def large_number_text(number: float) -> str:
    """A large number with three digits and a unit: ``1.23 M``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def time_text(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
