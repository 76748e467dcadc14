"""Probes that ``evaluate`` fitted: on disk in the run folder, and what they answer.

``RUN/probes/MODEL/TASK`` holds ``config.json`` and ``model.safetensors``, of a probe whose adapter was tuned with it
(``TASK-tuned``) the adapter too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoulders.errors import DataError, RecipeError
from shoulders.features import Features
from shoulders.storage.atomic import write_folder
from shoulders.tasks import classification, objects, semantic
from shoulders.tasks.feature_bank import as_kept
from shoulders.tasks.heads.objects import ObjectHead, pick

Sizes = Sequence[tuple[int, int]]  # (h, w) of each original image in px


@dataclass(frozen=True)
class Probe:
    """A head that was fitted on the features of a model.

    Args:
        task: a name in ``shoulders.tasks.TASKS``.
        model: whose features they were: ``student``, ``base`` or a teacher.
        classes: K names.
        size: (h, w) of the model's input in px.
        head: of the task.
        adapter: weights of the adapter that was tuned with it; None where the features were frozen.
    """

    task: str
    model: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    head: nn.Module
    adapter: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """``student/semantic``, ``base/instance-tuned``."""
        return f"{self.model}/{self.task}{'' if self.adapter is None else '-tuned'}"


def save_probe(run: Path, probe: Probe) -> Path:
    """Write a probe into a run folder, in place of an older one of its name.

    Raises:
        SpaceError: if the disk is full.
    """
    kind = KINDS[probe.task]
    told = {
        "task": probe.task,
        "model": probe.model,
        "head": kind.name,
        "width": kind.width(probe.head),
        "classes": probe.classes,
        "size": probe.size,
        "tuned": probe.adapter is not None,
    }
    parts = {"head": probe.head.state_dict(), "adapter": probe.adapter or {}}
    tensors = {f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()}

    def write(folder: Path) -> None:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")

    folder = run / "probes" / probe.name
    write_folder(folder, write)
    return folder


def probe_names(run: Path) -> list[str]:
    """The probes of a run folder."""
    folders = sorted(path.parent for path in (run / "probes").glob("*/*/config.json"))
    return [f"{folder.parent.name}/{folder.name}" for folder in folders if not folder.suffix]


def open_probe(run: Path, name: str) -> Probe:
    """A probe as `save_probe` left it.

    Raises:
        RecipeError: there is none of this name.
        DataError: something of it is missing or does not fit.
    """
    if name not in probe_names(run):
        there = ", ".join(probe_names(run)) or "none; shoulders evaluate leaves them there"
        raise RecipeError(f"--probe: {name!r} is not in {run}; it has {there}")
    folder = run / "probes" / name
    try:
        told = json.loads((folder / "config.json").read_text())
        kind, classes, (h, w) = KINDS[told["task"]], tuple(map(str, told["classes"])), told["size"]
        if kind.name != told["head"]:
            raise ValueError(f"a head of kind {told['head']!r}, for {told['task']} there is {kind.name!r}")
        tensors = load_file(folder / "model.safetensors")
        head = kind.build(int(told["width"]), len(classes))
        head.load_state_dict(_part(tensors, "head"), strict=True)
        adapter = _part(tensors, "adapter") if told["tuned"] else None
        return Probe(told["task"], str(told["model"]), classes, (int(h), int(w)), head.eval(), adapter)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: not a sound probe: {' '.join(str(error).split())[:300]}; fit it again") from error


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


@torch.no_grad()
def probe_answers(probe: Probe, features: Features, sizes: Sizes, threshold: float = 0.5) -> list[Any]:
    """What a probe says of each image, in the form of the transformers pipeline of its task.

    Args:
        features: of the probe's model.
        sizes: (h, w) of the original images; boxes and masks are in their pixels.
        threshold: objects of a lower score are left out.

    Returns:
        As `shoulders.teachers.heads.post_process.post_process`.
    """
    return KINDS[probe.task].answer(probe, features, sizes, threshold)


def classified(probe: Probe, features: Features, sizes: Sizes, threshold: float) -> list[Any]:
    """Classes, the best five first; the threshold does not apply."""
    scores, classes = probe.head(classification.image_vectors(features).float()).softmax(-1).sort(descending=True)
    pairs = [list(zip(*row, strict=True))[:5] for row in zip(scores.tolist(), classes.tolist(), strict=True)]
    return [[{"label": probe.classes[kind], "score": score} for score, kind in row] for row in pairs]


def segmented(probe: Probe, features: Features, sizes: Sizes, threshold: float) -> list[Any]:
    """A mask for each class that is there; the threshold does not apply."""
    told = []
    for logits, size in zip(probe.head(_maps(features)), sizes, strict=True):
        image = semantic.class_map(logits, size)  # (h, w)
        kinds = image.unique().tolist()
        told.append([{"label": probe.classes[kind], "score": None, "mask": image == kind} for kind in kinds])
    return told


def found(probe: Probe, features: Features, sizes: Sizes, threshold: float) -> list[Any]:
    """Objects with boxes, or with masks."""
    answer, told = probe.head(_maps(features)), []
    for image, size in enumerate(sizes):
        sure = pick(answer, image)
        sure = sure.take(sure.scores >= threshold)  # before masks are drawn as large as the image
        boxes = objects.in_pixels(sure, size, features.grid)
        masks = None if sure.masks is None else objects.draw(sure.masks, boxes, size)
        several = []
        for row, score in enumerate(sure.scores.tolist()):
            corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), boxes[row].tolist(), strict=True))
            where = {"box": corners} if masks is None else {"mask": masks[row]}
            several.append({"label": probe.classes[int(sure.classes[row])], "score": score, **where})
        told.append(several)
    return told


def _maps(features: Features) -> Tensor:
    """(B, C, H, W) as probes were fitted on them."""
    return as_kept(features.to_map().float()).float()


@dataclass(frozen=True)
class Kind:
    """The head that a task's probe is.

    Args:
        name: of the kind of head.
        build: (width, K) -> a fresh one.
        width: a head -> C of the features that it takes.
        answer: see `probe_answers`.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    width: Callable[[Any], int]
    answer: Callable[[Probe, Features, Sizes, float], list[Any]]


def _width_of_objects(head: Any) -> int:
    return int(head.trunk[0].num_features)


KINDS = {
    "classification": Kind("linear", classification.Linear, lambda head: len(head.mean), classified),
    "detection": Kind("dense", lambda width, k: ObjectHead(width, k, masks=False), _width_of_objects, found),
    "semantic": Kind("linear", semantic.linear_head, lambda head: head[0].num_features, segmented),
    "instance": Kind("dense", lambda width, k: ObjectHead(width, k, masks=True), _width_of_objects, found),
}
