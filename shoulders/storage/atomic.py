"""Files and folders that are written whole or not at all: aside, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from shoulders.errors import SpaceError

MANY = 100  # files: syncing the whole disk once is then cheaper than each of them


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder aside, sync every byte, and rename it to ``final``: never half there.

    Raises:
        SpaceError: if the disk is full.
    """
    aside = final.with_name(final.name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
        aside.mkdir(parents=True)
        write(aside)
        paths = sorted(aside.rglob("*"))
        if len(paths) > MANY:
            os.sync()
        else:
            for path in [*paths, aside]:
                sync(path)
        if final.exists():
            replaced = final.with_name(final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            aside.rename(final)
            shutil.rmtree(replaced)
        else:
            aside.rename(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise space_error(error, final) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: aside, sync, rename.

    Raises:
        SpaceError: if the disk is full.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))  # names of files need not be text


def write_bytes(path: Path, data: bytes) -> None:
    """Like `write_text`."""
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(data)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise space_error(error, path) from error


def space_error(error: Exception, path: Path, fix: str = "make room and start again with --resume") -> Exception:
    """The error as a SpaceError that says what is free, where a full disk is what it means; else as it is."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    full = full or any(words in str(error) for words in ("No space left", "quota exceeded"))  # of safetensors
    if not full:
        return error
    there = next(above for above in path.absolute().parents if above.exists())
    free = shutil.disk_usage(there).free // 2**20
    return SpaceError(f"{path}: no space left on the disk ({free} MiB free); {fix}")


def sync(path: Path) -> None:
    """Bring a file, or what a folder lists, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_text(count: float) -> str:
    """A number of bytes as text, in the largest unit that keeps it above 1."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
