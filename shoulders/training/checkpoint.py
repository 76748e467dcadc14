"""Checkpoints: written to a temporary folder, synced and renamed; verified byte for byte before they are loaded.

A checkpoint is a folder ``step-00001000`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json``
(size and sha256 of the other files: the tensor format itself does not notice a flipped bit).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from shoulders.errors import DataError, ProcessLost
from shoulders.storage.atomic import write_folder
from shoulders.storage.json_text import parse_json
from shoulders.storage.manifest import check_manifest, write_manifest
from shoulders.storage.tensor_files import read_tensors

NAME = "step-{:08d}"
FILES = TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and then remove all but the latest ``keep``.

    Raises:
        SpaceError: the disk is full; the earlier checkpoints remain.
    """

    def write(temporary: Path) -> None:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(state | {"step": step}, indent=1))
        write_manifest(temporary, FILES)

    final = folder / NAME.format(step)
    write_folder(final, write)
    others = [path for path in checkpoints(folder) if path != final]
    older = [path for path in others if path < final]
    # a checkpoint of a later step is a damaged one: the run was resumed from an earlier step
    later = [path for path in others if path > final]
    unfinished = [*folder.glob("step-*.partial"), *folder.glob("step-*.replaced")]  # left by a killed run
    for path in [*older[: max(0, len(older) - keep + 1)], *later, *unfinished]:
        shutil.rmtree(path)
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of one checkpoint.

    Raises:
        DataError: a file is missing, its size or bytes differ from the manifest, or the manifest does not list it.
    """
    check_manifest(path, FILES)
    try:
        return read_tensors(path / TENSORS), parse_json((path / STATE).read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: damaged checkpoint ({' '.join(str(error).split())})") from error


def load_newest(folder: Path, log: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest valid checkpoint, or None where there are no checkpoints.

    Args:
        log: gets a line for each damaged checkpoint.

    Raises:
        DataError: there are checkpoints, and none is valid.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except DataError as error:
            log(f"{error}; trying the previous one")
    if paths:
        raise DataError(
            f"{folder}: none of the {len(paths)} checkpoints is valid; start again without --resume in a new out"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir())


@contextmanager
def name_checkpoint(out: Path) -> Iterator[None]:
    """Add to the error of a lost process how to resume the run in the folder ``out``."""
    try:
        yield
    except ProcessLost as error:
        latest = checkpoints(out / "checkpoints")[-1:]
        resume = f"resume from {latest[0].name} with --resume" if latest else "no checkpoint was saved: start it again"
        raise type(error)(f"{error}; {resume}", error.exit_code) from error


def fingerprint(*modules: nn.Module, settings: object = None) -> str:
    """A sha256 over all weights and buffers of frozen modules, to notice that a resumed run has other ones.

    Args:
        settings: further plain data that must be the same.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
