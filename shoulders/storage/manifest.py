"""Manifests: the size and sha256 of files that belong together. No format of tensors notices a flipped bit by itself.

A manifest lists the files of a folder that match some patterns. Such a file that is missing, changed or not listed is
refused; other files in the folder may be added and changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoulders.errors import DataError
from shoulders.storage.atomic import write_text
from shoulders.storage.json_text import parse_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, patterns: Sequence[str]) -> None:
    """Write ``folder/manifest.json``.

    Args:
        patterns: of the names of the files, relative to the folder, such as ``heads/*/*.json``.
    """
    entries = {name: _entry(path) for name, path in _files(folder, patterns).items()}
    write_text(folder / MANIFEST, json.dumps(entries, indent=1))


def check_manifest(folder: Path, patterns: Sequence[str]) -> None:
    """Refuse a folder whose files are not those that were written.

    Args:
        patterns: as for `write_manifest`.

    Raises:
        DataError: a file is missing, was added, or has another size or other bytes; or there is no manifest that lists
            files.
    """
    try:
        entries = parse_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{folder / MANIFEST}: lists no files")
    files = _files(folder, patterns)
    for name in sorted({*entries, *files}):
        if name not in files:
            raise DataError(f"{folder / name}: missing; {MANIFEST} lists it")
        if name not in entries:
            raise DataError(f"{folder / name}: not listed in {MANIFEST}")
        if _entry(files[name]) != entries[name]:
            raise DataError(f"{folder / name}: its bytes are not those that were saved")


def _files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """{name: path} of the files that match; hidden ones, such as macOS writes beside others, are left out."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in sorted(paths) if not path.name.startswith(".")}
    return {name: path for name, path in names.items() if path.name != MANIFEST}


def _entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
