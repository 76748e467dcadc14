"""Heads on disk: a folder with a head and no encoder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from shoulders.errors import DataError
from shoulders.hub import check_finite, quiet, why_refused
from shoulders.hub.weight_files import WEIGHTS
from shoulders.storage.json_text import parse_json
from shoulders.storage.tensor_files import check_header, read_tensors
from shoulders.teachers import FAMILIES, Tap
from shoulders.teachers.families import family_name
from shoulders.teachers.heads import (
    ClassNames,
    Head,
    ModuleHead,
    TeacherHead,
    ZeroShot,
    head_class,
    open_zero_shot,
    read_processor,
)
from shoulders.teachers.heads.module_head import build_head, describe_code


def save_head(head: Head, folder: Path) -> None:
    """Write a head without its encoder: config.json, model.safetensors, the image processor, and head.json.

    The head of an image-text teacher is stored as embeddings of its class names, without the towers; a head of your
    own as the import path of its class, its arguments and its weights.
    """
    folder.mkdir(parents=True)
    if not isinstance(head, ModuleHead):
        with quiet():
            head.model.config.save_pretrained(folder)
            if head.processor is not None:
                head.processor.save_pretrained(folder)
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in _weights(head).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    taps = {name: [tap.summary, tap.spatial, list(tap.grid)] for name, tap in head.taps.items()}
    settings = {"names": asdict(head.names)} if isinstance(head, ZeroShot) else {"size": list(head.size)}
    settings |= describe_code(head.head) if isinstance(head, ModuleHead) else {}
    (folder / "head.json").write_text(json.dumps(settings | {"taps": taps}) + "\n")


def open_head(folder: Path) -> Head:
    """A head as `save_head` wrote it.

    Raises:
        DataError: a file is missing or damaged, or the files do not belong together.
    """
    try:
        settings = _read_settings(folder / "head.json")
        check_header(folder / WEIGHTS)
        taps = {name: Tap(summary, spatial, tuple(grid)) for name, (summary, spatial, grid) in settings["taps"].items()}
        head = _open(folder, settings, taps)
        check_finite(head)
        return head
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: not a valid head: {' '.join(str(error).split())[:300]}") from error


def _open(folder: Path, settings: dict[str, Any], taps: dict[str, Tap]) -> Head:
    if "code" in settings:
        return _open_module_head(folder, settings, taps)
    _read_settings(folder / "config.json")  # refused before transformers builds anything from it
    if "names" in settings:
        return open_zero_shot(folder, _class_names(**settings["names"]), taps)
    h, w = settings["size"]
    return _open_teacher_head(folder, taps, (h, w))


def _read_settings(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = parse_json(path.read_text())
    if reason := why_refused(settings):
        raise ValueError(f"{path.name}: {reason}")
    return settings


def _class_names(classes: list[str], prompts: list[str], source: str, revision: str | None) -> ClassNames:
    return ClassNames(tuple(classes), tuple(prompts), source, revision)


def _open_module_head(folder: Path, settings: dict[str, Any], taps: dict[str, Tap]) -> ModuleHead:
    """A head of your own; its code is imported, but never code that comes with the student."""
    student = folder.parent.parent
    refused = (student, student.parent) if student.name == "student" else (student,)
    code, (h, w) = str(settings["code"]), settings["size"]
    try:
        task_head = build_head(code, settings["args"], refused)
    except ValueError as error:
        raise DataError(
            f"{folder}: its code {code!r} cannot be used: {error}; run the command in the folder that has the code, or "
            "install it"
        ) from error
    head = ModuleHead(task_head, taps, (h, w))
    _load_weights(head, folder)
    return head


def _open_teacher_head(folder: Path, taps: dict[str, Tap], size: tuple[int, int]) -> TeacherHead:
    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = head_class(config)(config)
    spec = FAMILIES[family_name(config.to_dict())].head
    if spec is None:
        raise ValueError(f"the head of a {config.model_type} cannot be separated from its encoder")
    head = TeacherHead(model, spec, taps, size, read_processor(str(folder)))
    _load_weights(head, folder)
    return head


def _load_weights(head: Head, folder: Path) -> None:
    missing, left_over = head.load_state_dict(read_tensors(folder / WEIGHTS), strict=False)
    if absent := [name for name in missing if name in _weights(head)]:
        raise ValueError(f"the weights lack {absent[0]}")
    if left_over:
        raise ValueError(f"the weights have {left_over[0]}, which the head does not")


def _weights(head: Head) -> dict[str, Tensor]:
    """The weights by name; of several names for the same memory only the first."""
    addresses: set[int] = set()
    weights = {}
    for name, value in head.state_dict().items():
        if value.data_ptr() not in addresses or value.numel() == 0:
            weights[name] = value
        addresses.add(value.data_ptr())
    return weights
