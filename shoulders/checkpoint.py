"""Checkpoints: written aside, synced, renamed; verified byte for byte before anything is read from them.

A checkpoint is a folder ``step-00001000`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json``
(size and sha256 of the other files: no tensor format in use notices a flipped bit by itself).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoulders.errors import DataError, SpaceError

NAME = "step-{:08d}"
MANIFEST = "manifest.json"
MANY = 100  # files: syncing the whole disk once is then cheaper than each of them


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and then remove all but the newest ``keep``.

    Raises:
        SpaceError: if the disk is full; what was there before is untouched.
    """

    def write(aside: Path) -> None:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, aside / "tensors.safetensors")
        (aside / "state.json").write_text(json.dumps(state | {"step": step}, indent=1))
        files = {path.name: _fingerprint(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(files, indent=1))

    final = folder / NAME.format(step)
    write_folder(final, write)
    others = [path for path in checkpoints(folder) if path != final]
    older = [path for path in others if path < final]
    # newer than what is saved now can only be one that was damaged and gone back before
    for path in [*older[: max(0, len(older) - keep + 1)], *(path for path in others if path > final)]:
        shutil.rmtree(path)
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of one checkpoint.

    Raises:
        DataError: if any file is missing, has another size or other bytes than the manifest says.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                raise DataError(f"{path / name}: not the bytes that were saved")
        return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text())
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise DataError(f"{path}: damaged checkpoint ({' '.join(str(error).split())})") from error


def load_newest(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Damaged ones are named to ``say``; they are never counted among those that are kept.

    Raises:
        DataError: if there are checkpoints and none verifies.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except DataError as error:
            say(f"{error}; trying the one before")
    if found:
        raise DataError(
            f"{folder}: none of the {len(found)} checkpoints verifies; start again without --resume in a new out"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir())


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


def fingerprint(*modules: nn.Module, facts: object = None) -> str:
    """A sha256 over all weights and buffers of frozen modules: whether a run goes on with what it began with.

    Args:
        facts: what else is to be the same: plain data.
    """
    digest = hashlib.sha256(repr(facts).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def space_error(error: Exception, path: Path, fix: str = "make room and start again with --resume") -> Exception:
    """The error as a SpaceError that says what is free, where a full disk is what it means; else as it is."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    full = full or any(words in str(error) for words in ("No space left", "quota exceeded"))  # of safetensors
    if not full:
        return error
    there = next(above for above in path.absolute().parents if above.exists())
    free = shutil.disk_usage(there).free // 2**20
    return SpaceError(f"{path}: no space left on the disk ({free} MiB free); {fix}")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Bring a file, or what a folder lists, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
