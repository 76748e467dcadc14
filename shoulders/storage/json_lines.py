"""Lists of JSON objects that grow line by line; the last line may be incomplete, if a process was killed in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shoulders.errors import DataError
from shoulders.storage.atomic import append_text
from shoulders.storage.json_text import parse_json


def append_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Append rows in ASCII: names may hold any character.

    Raises:
        SpaceError: the disk is full.
    """
    append_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path, keys: Sequence[str], truncate: bool) -> list[dict[str, str]]:
    """The complete rows of a list; none where it does not exist.

    Args:
        path: of the list.
        keys: that each row has.
        truncate: whether to remove an incomplete last line.

    Raises:
        DataError: the file is not such a list.
    """
    content = path.read_bytes() if path.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content) and truncate:
        os.truncate(path, len(complete))
    try:
        rows = [parse_json(line) for line in complete.splitlines()]
        return [{key: str(row[key]) for key in keys} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a list with {' and '.join(keys)}; move it out of the way") from error
