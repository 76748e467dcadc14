"""Atomic writes: data goes to a neighbouring ``.partial`` path, is synced to disk, and is renamed to its final name."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from shoulders.errors import SpaceError

MAKE_ROOM = "make room and start again; a run continues with --resume"
MAX_FILE_SYNCS = 100  # for more files than that, one sync of the whole disk is faster


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically: ``final`` is either absent, the previous version or complete.

    Args:
        final: path of the folder; an existing one is replaced.
        write: fills the folder whose path it gets.

    Raises:
        SpaceError: the disk is full.
    """
    partial = final.with_name(final.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir(parents=True)
        write(partial)
        use_umask(partial)
        _sync_tree(partial)
        if final.exists():
            replaced = final.with_name(final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced)
        else:
            partial.rename(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise space_error(error, final) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where an error or a second Ctrl-C left it


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        SpaceError: the disk is full.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))  # names of files may hold bytes that are not UTF-8


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file atomically.

    Args:
        durable: whether to wait for the disk, so that the file outlives a loss of power.

    Raises:
        SpaceError: the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        if durable:
            sync(partial)
        partial.replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise space_error(error, path) from error


def append_text(path: Path, text: str) -> None:
    """Append to a text file; its readers have to tolerate an incomplete last line.

    Raises:
        SpaceError: the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise space_error(error, path) from error


def use_umask(folder: Path, pattern: str = "**/*") -> None:
    """Give files the permissions of any new file: safetensors creates its files for their owner alone.

    Args:
        pattern: of the files in the folder.
    """
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)  # the umask cannot be read without setting it for all threads
    new.unlink()
    for path in folder.glob(pattern):
        if path.is_file():
            path.chmod(mode)


def space_error(error: Exception, path: Path, fix: str = MAKE_ROOM) -> Exception:
    """Translate an error of a full disk.

    Args:
        error: what a write raised.
        path: what was written.
        fix: what the user has to do, the end of the message.

    Returns:
        A SpaceError with the free space, or ``error`` itself if its cause is not a full disk.
    """
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    is_full = is_full or any(words in str(error) for words in ("No space left", "quota exceeded"))  # of safetensors
    if not is_full:
        return error
    return SpaceError(f"{path}: no space left on the disk ({free_bytes(path) // 2**20} MiB free); {fix}")


def free_bytes(path: Path) -> int:
    """Free space of the disk on which ``path`` is or will be."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_text(count: float) -> str:
    """Format a number of bytes in the largest of bytes, KiB, MiB and GiB that keeps it at 1 or more."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _sync_tree(folder: Path) -> None:
    paths = sorted(folder.rglob("*"))
    if len(paths) > MAX_FILE_SYNCS:
        os.sync()
        return
    for path in [*paths, folder]:
        sync(path)
