"""Probes that ``evaluate`` fitted, saved in the run folder.

``RUN/probes/MODEL/TASK`` holds ``config.json`` and ``model.safetensors``, with the weights of the adapter if that was
finetuned (``TASK-finetuned``), and ``manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from shoulders.errors import DataError, RecipeError
from shoulders.features import Features
from shoulders.hub import LOAD_ERRORS, check_finite, why_refused
from shoulders.storage.atomic import write_folder
from shoulders.storage.json_text import parse_json
from shoulders.storage.manifest import check_manifest, write_manifest
from shoulders.storage.tensor_files import read_tensors
from shoulders.tasks import TASKS

FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Probe:
    """A head that was fitted on the features of a model.

    Args:
        task: a name in `shoulders.tasks.TASKS`.
        model: whose features: ``student``, ``base`` or a teacher.
        classes: K names.
        size: (h, w) of the model's input in px.
        head: of the task.
        adapter: weights of the adapter that was trained with it; None where the features were frozen.
    """

    task: str
    model: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    head: nn.Module
    adapter: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """``student/semantic``, ``base/instance-finetuned``."""
        return f"{self.model}/{self.task}{'' if self.adapter is None else '-finetuned'}"


def save_probe(run: Path, probe: Probe) -> Path:
    """Write a probe into a run folder, in place of an older one of its name.

    Returns:
        The folder of the probe.

    Raises:
        SpaceError: if the disk is full.
    """
    head = TASKS[probe.task].probe_head
    config = {
        "task": probe.task,
        "model": probe.model,
        "head": head.name,
        "width": head.width(probe.head),
        "classes": probe.classes,
        "size": probe.size,
        "finetuned": probe.adapter is not None,
    }
    components = {"head": probe.head.state_dict(), "adapter": probe.adapter or {}}
    tensors = {f"{name}.{key}": value for name, state in components.items() for key, value in state.items()}

    def write(folder: Path) -> None:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_manifest(folder, FILES)

    folder = run / "probes" / probe.name
    write_folder(folder, write)
    return folder


def probe_names(run: Path) -> list[str]:
    """The probes of a run folder."""
    folders = sorted(path.parent for path in (run / "probes").glob("*/*/config.json"))
    return [f"{folder.parent.name}/{folder.name}" for folder in folders if not folder.suffix]


def open_probe(run: Path, name: str, verify: bool = True) -> Probe:
    """Load a probe as `save_probe` wrote it.

    Args:
        verify: compare its files with its manifest.

    Raises:
        RecipeError: there is none of this name.
        DataError: a file of it is missing or damaged, or does not fit.
    """
    if name not in probe_names(run):
        known = ", ".join(probe_names(run)) or "none; shoulders evaluate saves them"
        raise RecipeError(f"--probe: {name!r} is not in {run}; it has {known}")
    folder = run / "probes" / name
    try:
        if verify:
            check_manifest(folder, FILES)
        config = parse_json((folder / "config.json").read_text())
        if reason := why_refused(config):
            raise ValueError(f"config.json: {reason}")
        task, classes, (h, w) = TASKS[config["task"]], tuple(map(str, config["classes"])), config["size"]
        if task.probe_head.name != config["head"]:
            raise ValueError(f"its head is of kind {config['head']!r}, {task.name} has {task.probe_head.name!r}")
        tensors = read_tensors(folder / "model.safetensors")
        head = task.probe_head.build(int(config["width"]), len(classes))
        head.load_state_dict(_component(tensors, "head"), strict=True)
        check_finite(head)
        adapter = _component(tensors, "adapter") if config["finetuned"] else None
        return Probe(task.name, str(config["model"]), classes, (int(h), int(w)), head.eval(), adapter)
    except (*LOAD_ERRORS, RuntimeError, SafetensorError, DataError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: not a valid probe: {reason}; fit it again with shoulders evaluate") from error


def _component(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def predict_with_probe(
    probe: Probe, features: Features, sizes: Sequence[tuple[int, int]], threshold: float = 0.5
) -> list[Any]:
    """The predictions of a probe for each image, in the form of the transformers pipeline of its task.

    Args:
        features: of the probe's model.
        sizes: (h, w) of the original images; boxes and masks are in their pixels.
        threshold: minimum score of an object.

    Returns:
        As `shoulders.teachers.heads.post_process.post_process`.
    """
    post_process = TASKS[probe.task].probe_head.post_process
    return post_process(probe.head, probe.classes, features, sizes, threshold)
