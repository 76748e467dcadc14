"""Results as text: tables, cells, and a prediction in a few words."""

from __future__ import annotations

from typing import Any

from shoulders.errors import printable

Table = tuple[list[str], list[list[str]], list[str]]  # column titles, rows, and lines below the table
MAX_LISTED = 4  # classes or objects of a prediction


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """Print rows under their titles, each column as wide as its widest cell; control characters are escaped."""
    titles, *rows = ([printable(text) for text in row] for row in (titles, *rows))
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in [titles, ["-" * width for width in widths], *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def summarize_prediction(prediction: Any) -> str:
    """The first classes or objects of a prediction with their scores."""
    if isinstance(prediction, dict):
        return "depth map"
    scores = [f"{item['label']}" + ("" if item["score"] is None else f" {item['score']:.2f}") for item in prediction]
    rest = f" and {len(scores) - MAX_LISTED} more" if len(scores) > MAX_LISTED else ""
    return ", ".join(scores[:MAX_LISTED]) + rest or "no objects"


def cell(value: Any) -> str:
    """A value as a cell of a table."""
    if isinstance(value, dict | list | tuple):
        return ", ".join(map(str, value))
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
