"""Bytes of a run: in memory, and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from shoulders.config.section import as_size
from shoulders.config.sections import Train
from shoulders.distillation import Trainer
from shoulders.feature_cache import CachedTeachers
from shoulders.hub import quiet
from shoulders.hub.card import write_card
from shoulders.teachers.heads import load_head
from shoulders.teachers.heads.saved import save_head
from shoulders.training.batches import RunBatches
from shoulders.training.heldout import MAX_TOKENS
from shoulders.training.step import TrainStep

IMAGES = 2  # of the smaller of two counted steps
OVERHEAD = 1.5  # times the saved activations: gradients, and what teachers hold during their forward pass


def bytes_per_image(step: TrainStep, batches: RunBatches) -> float:
    """Bytes that a step takes for each image: the activations saved for its backward pass, times ``OVERHEAD``."""
    few, more = (saved_bytes(step, batches, images) for images in (IMAGES, 2 * IMAGES))
    return OVERHEAD * max(0.0, (more - few) / IMAGES)


def saved_bytes(step: TrainStep, batches: RunBatches, images: int) -> int:
    """Bytes that a step of so many images saves for its backward pass."""
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        saved[memory.data_ptr()] = memory.nbytes()
        return x

    one = replace(step, accumulate=1, compile=False)
    with (
        closing(replace(batches, batch=images).training(0, 1)) as stream,
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        one(1, next(stream))
    return sum(saved.values())


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory for this process: on its GPU where it has one, else of the machine or the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = Path("/sys/fs/cgroup/memory.max")
    container = file.read_text().strip() if file.exists() else ""
    return min(machine, int(container)) if container.isdecimal() else machine


def accumulate_that_fits(train: Train, held: float, per_image: float, available: int) -> int:
    """The ``train.accumulate`` with which a step fits into memory: the recipe's own if it does."""
    for accumulate in range(train.accumulate, train.batch):
        if train.batch % accumulate == 0 and held + per_image * train.batch / accumulate <= available:
            return accumulate
    return train.batch


def heldout_bytes(trainer: Trainer) -> int:
    """Bytes in memory of the held-out images: their pixels, and teacher features of a few tokens."""
    h, w = trainer.batches.size
    grid = trainer.student.encoder.grid((h, w))
    tokens = min(MAX_TOKENS, grid[0] * grid[1])
    taps = trainer.student.config.taps.values()
    channels = sum((tap["summary"] or 0) + tokens * (tap["spatial"] or 0) for tap in taps)
    features = 4 * channels if trainer.dist.device.type == "cpu" else 0  # they stay in main memory
    return len(trainer.images.heldout) * (3 * h * w + features)


def checkpoint_bytes(trainer: Trainer) -> int:
    """Bytes of one checkpoint, after a step."""
    return _file_bytes(trainer.optimizers.tensors())


def student_bytes(trainer: Trainer) -> int:
    """Bytes of the student's folder: its weights are counted, all other files written to a temporary folder."""
    student, recipe = trainer.student, trainer.recipe
    with TemporaryDirectory() as temporary, quiet():
        folder = Path(temporary)
        student.config.save_pretrained(folder)
        write_card(folder, as_size(recipe.images.size), student.encoder.patch_size, student.config.teachers)
        for name in recipe.keep_heads:
            head = load_head(name, recipe.teachers.get(name), trainer.teachers[name])
            save_head(head, folder / "heads" / name)
        others = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return _file_bytes(student.state_dict()) + others


def cache_bytes(teachers: CachedTeachers) -> int:
    """Bytes of the cache that a run reads."""
    return sum(len(store.index) * store.shards.record_bytes for store in teachers.stores.values())


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file: a JSON header, then the numbers."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        end += tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end
