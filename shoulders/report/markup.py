"""Pieces of HTML. What comes from a run is escaped here, where it enters the page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Html(str):
    """Text that is markup already; any other text is escaped."""


class Image(NamedTuple):
    """A picture inside the page.

    Args:
        uri: a ``data:`` URI.
        alt: what is to be seen, in words.
        size: (width, height) in px.
    """

    uri: str
    alt: str
    size: tuple[int, int]


def text(value: object) -> Html:
    """A value as it is safe inside an element or a quoted attribute."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, *inside: object, **attributes: object) -> Html:
    """``<name attributes>inside</name>``; ``class_`` and ``aria_label`` stand for class and aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value != ""
    )
    return Html(f"<{name}{given}>{''.join(text(part) for part in inside)}</{name}>")


def image(picture: Image, class_: str = "") -> Html:
    """An ``<img>``; its size is there before it is decoded, so that nothing jumps."""
    w, h = picture.size
    shown = f' class="{text(class_)}"' if class_ else ""
    return Html(f'<img{shown} src="{picture.uri}" alt="{text(picture.alt)}" width="{w}" height="{h}" decoding="async">')


def section(name: str, title: str, *inside: object) -> Html:
    """A part of the page with its heading, to be linked to by name."""
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *inside, id=name, aria_labelledby=f"{name}-title")


def figure(content: Html, title: object, caption: object = "", **attributes: object) -> Html:
    """Something to look at, under its title and a caption."""
    return element("figure", element("figcaption", element("strong", title), " ", caption), content, **attributes)


def paragraph(*inside: object, class_: str = "") -> Html:
    """A paragraph."""
    return element("p", *inside, class_=class_)


def missing(sentence: str, command: str) -> Html:
    """What stands where a run has no data: a sentence, and the command that fills the gap."""
    return paragraph(sentence, " ", element("code", command), class_="missing")


def table(caption: str, titles: Sequence[object], rows: Iterable[Sequence[object]], class_: str = "") -> Html:
    """A table that scrolls inside its own box where it is too wide; the first cell of a row is its header."""
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = [element("tr", element("th", row[0], scope="row"), *map(_as_cell, row[1:])) for row in rows]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", whole, class_=f"scroll {class_}".strip(), role="region", aria_label=caption, tabindex="0")


def _as_cell(cell: object) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else element("td", cell)


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def in_words(number: int) -> str:
    """Small numbers as words."""
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def short(number: float) -> str:
    """A large number as people read it: ``1.23 M``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
