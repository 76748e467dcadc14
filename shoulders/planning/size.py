"""Bytes of a run: what it holds in memory, and what it leaves on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from shoulders.config.recipe import Recipe, Train, as_size
from shoulders.distillation import Run
from shoulders.feature_cache import CachedTeachers
from shoulders.hub import quiet
from shoulders.hub.card import write_card
from shoulders.teachers.heads import load_head
from shoulders.teachers.heads.saved import save_head
from shoulders.training.heldout import MAX_TOKENS

FEW = 2  # images
COMES_AND_GOES = 1.5  # of what a step keeps for its way back: gradients, and what teachers hold while they are asked


def changed(recipe: Recipe, **train: Any) -> Recipe:
    """The recipe with other values in ``train``."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def bytes_per_image(run: Run) -> float:
    """Bytes that a step takes for each image: what it keeps for the way back, counted on few, and half as much more."""
    few, more = (_saved(run, images) for images in (FEW, 2 * FEW))
    return COMES_AND_GOES * max(0.0, (more - few) / FEW)


def _saved(run: Run, images: int) -> int:
    """Bytes that a step of so many images keeps for its way back."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return x

    recipe, run.recipe = run.recipe, changed(run.recipe, batch=images, accumulate=1)
    with closing(run._batches(0, 1, 0, 1)) as stream, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run.step(1, next(stream))
    run.recipe = recipe
    return sum(kept.values())


def memory_there(device: torch.device) -> int:
    """Bytes of memory for this process: of its GPU where it has one, else of the machine or the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    most = limit.read_text().strip() if limit.exists() else ""
    return min(there, int(most)) if most.isdecimal() else there


def parts_that_fit(train: Train, held: float, per_image: float, there: int) -> int:
    """The ``train.accumulate`` with which a step fits into memory: the recipe's own if it does."""
    for parts in range(train.accumulate, train.batch):
        if train.batch % parts == 0 and held + per_image * train.batch / parts <= there:
            return parts
    return train.batch


def heldout_bytes(run: Run) -> int:
    """What is held in memory of the held-out images: their pixels, and what the teachers say of a few places."""
    h, w = run.size
    places = min(MAX_TOKENS, (h // run.student.encoder.patch_size) * (w // run.student.encoder.patch_size))
    widths = sum((tap["summary"] or 0) + places * (tap["spatial"] or 0) for tap in run.student.config.taps.values())
    said = 4 * widths if run.dist.device.type == "cpu" else 0  # that stays in the machine's own memory
    return len(run.images.heldout) * (3 * h * w + said)


def checkpoint_bytes(run: Run) -> int:
    """Of one checkpoint, once a step is done."""
    return _file_bytes(run.optimization.tensors())


def student_bytes(run: Run) -> int:
    """Of the student's folder: its weights counted, all that lies beside them written to a folder that goes again."""
    student, recipe = run.student, run.recipe
    with TemporaryDirectory() as aside, quiet():
        folder = Path(aside)
        student.config.save_pretrained(folder)
        write_card(folder, as_size(recipe.images.size), student.encoder.patch_size, student.config.teachers)
        for name in recipe.keep_heads:
            head = load_head(name, recipe.teachers[name], run.teachers[name])
            save_head(head, folder / "heads" / name)
        beside = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return _file_bytes(student.state_dict()) + beside


def cache_bytes(teachers: CachedTeachers) -> int:
    """Of the cache that a run reads."""
    return sum(len(store.index) * store.shards.record_bytes for store in teachers.stores.values())


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of a safetensors file: a JSON header, then the numbers."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        end += tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end
