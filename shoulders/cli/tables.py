"""How the command line puts answers into words and columns."""

from __future__ import annotations

from typing import Any


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """Rows under their titles, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in [titles, ["-" * width for width in widths], *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def brief(answer: Any) -> str:
    """An answer in a few words: the first classes or objects with their scores."""
    if isinstance(answer, dict):
        return "depth map"
    scores = [f"{one['label']}" + ("" if one["score"] is None else f" {one['score']:.2f}") for one in answer]
    return ", ".join(scores[:4]) + (f" and {len(scores) - 4} more" if len(scores) > 4 else "") or "nothing found"


def cell(value: Any) -> str:
    """A value as a cell of a table."""
    if isinstance(value, dict | list | tuple):
        return ", ".join(map(str, value))
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
