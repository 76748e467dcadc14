"""The rows of a ``results.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from shoulders.errors import DataError
from shoulders.storage.atomic import write_text
from shoulders.storage.json_text import parse_json


def upsert_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a ``results.json``, where they replace earlier rows of the same measurement.

    Two rows are of the same measurement if they agree in model, head, task, data, metric, seed and kind of probe.
    """

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        settings = row.get("settings", {})
        probe = (settings.get("finetune"), settings.get("head"))
        return *probe, *(row.get(column) for column in ("model", "head", "task", "data", "metric", "seed"))

    replaced = {key(row) for row in rows}
    with FileLock(path.with_name(f".{path.name}.lock")):  # two evaluations may write at the same time
        others = [row for row in read_rows(path) if key(row) not in replaced]
        write_text(path, json.dumps(others + rows, indent=1))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``results.json``; an empty list where the file does not exist.

    Raises:
        DataError: the file is damaged.
    """
    try:
        rows = parse_json(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); move it out of the way, and measure again") from error
    return rows
