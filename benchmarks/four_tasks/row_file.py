"""A JSON file of rows that is written after every measurement, so that an interrupted benchmark can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoulders.storage.atomic import write_text

Row = dict[str, Any]


class RowFile:
    """A JSON file of rows.

    Args:
        path: the file; the rows in it need not be measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = _read(path)

    def has(self, **match: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(key) == value for key, value in match.items()) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Add rows to the file; rows that another process has added meanwhile stay."""
        self.rows = _read(self.path) + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, dump(self.rows))
        for row in rows:
            print({key: value for key, value in row.items() if value is not None and key != "seconds"}, flush=True)


def publish(rows: list[Row], path: Path) -> list[Row]:
    """Write rows to a published file, where they replace those of the same data sets; returns all rows of the file."""
    measured = {row["dataset"] for row in rows}
    merged = [row for row in _read(path) if row["dataset"] not in measured] + rows
    write_text(path, dump(merged))
    return merged


def dump(rows: list[Row]) -> str:
    """JSON with one row in a line, so that a change of a row is a change of one line."""
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"


def _read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows
