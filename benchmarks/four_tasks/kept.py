"""Rows in a file that is written after every measurement, so that whoever was killed goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoulders.storage.atomic import write_text

Row = dict[str, Any]


class Kept:
    """The rows in a JSON file.

    Args:
        path: the file; what it holds already counts as measured.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = _read(path)

    def has(self, **match: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(key) == value for key, value in match.items()) for row in self.rows)

    def keep(self, rows: list[Row]) -> None:
        """Add rows, in the file too; those that another process put there meanwhile stay."""
        self.rows = _read(self.path) + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, dump(self.rows))
        for row in rows:
            print({key: value for key, value in row.items() if value is not None and key != "seconds"}, flush=True)


def publish(rows: list[Row], path: Path) -> list[Row]:
    """Put rows into a published file: they replace those of their data sets and leave the others; returns all."""
    before = _read(path)
    fresh = {row["dataset"] for row in rows}
    merged = [row for row in before if row["dataset"] not in fresh] + rows
    write_text(path, dump(merged))
    return merged


def dump(rows: list[Row]) -> str:
    """JSON with one row to a line, so that a change of one is a change of one line."""
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"


def _read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows
