"""The rows of a ``results.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from shoulders.errors import DataError
from shoulders.storage.atomic import write_text


def upsert_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a ``results.json``: they replace those of the same measurement and leave all others."""

    def same(row: dict[str, Any]) -> tuple[Any, ...]:
        settings = row.get("settings", {})
        how = (settings.get("tune"), settings.get("head"))  # the probe
        return *how, *(row.get(key) for key in ("model", "head", "task", "data", "metric", "seed"))

    new = {same(row) for row in rows}
    with FileLock(path.with_name(f".{path.name}.lock")):  # two processes may measure at once
        before = read_rows(path)
        write_text(path, json.dumps([row for row in before if same(row) not in new] + rows, indent=1))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``results.json``; none where there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); move it out of the way, and measure again") from error
    return rows
