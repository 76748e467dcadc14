"""The JSON files of a cache, which hold their own checksum, and the names of all files.

The folder of a teacher holds ``layout.json`` (written first: the fingerprint and the layout of a record),
``channels.safetensors`` (if channels are transformed), ``shard-00000.bin`` .. and ``manifest.json`` (written last: the
checksums of all other files).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shoulders.errors import DataError
from shoulders.storage.atomic import write_text
from shoulders.storage.json_text import parse_json

LAYOUT, MANIFEST, CHANNELS = "layout.json", "manifest.json", "channels.safetensors"
SHARD = "shard-{:05d}.bin"


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file with the sha256 of its contents.

    Raises:
        SpaceError: the disk is full.
    """
    write_text(path, _dump(tree | {"sha256": _sha256(tree)}))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`.

    Raises:
        DataError: a byte differs from what was written.
    """
    try:
        text = path.read_bytes()
        tree = parse_json(text)
        sha256 = tree.pop("sha256")
        if sha256 != _sha256(tree) or text != _dump(tree | {"sha256": sha256}).encode():
            raise ValueError("not the bytes that were written")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged ({reason}); remove {path.parent} and build it again") from error
    return tree


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def _sha256(tree: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(tree).encode()).hexdigest()
