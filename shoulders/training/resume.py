"""What must not change between the start of a run and its continuation, beside its recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.errors import DataError
from shoulders.images import ImageSet
from shoulders.model import ShouldersModel
from shoulders.teachers import AnyTeachers
from shoulders.training.checkpoint import fingerprint

# what may differ -> how an error names it
RESUME_INVARIANTS = {
    "models": "the base, a teacher, or whether teachers are live or cached (cache.mode)",
    "images": "the set of images",
    "bf16": "the precision that this machine computes in (train.precision)",
}


def resume_invariants(student: ShouldersModel, teachers: AnyTeachers, images: ImageSet) -> dict[str, Any]:
    """The values of a run that its checkpoints record; before the models are sharded."""
    normalisation = student.config.mean, student.config.std
    settings = teachers.taps, teachers.sizes, teachers.preprocessing(), normalisation
    return {
        "models": fingerprint(student.encoder.base, teachers, settings=settings),
        "images": hashlib.sha256(np.sort(images.collection.ids).tobytes()).hexdigest(),
        "bf16": teachers.bf16,
    }


def check_invariants(out: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other models, other images or another precision.

    Raises:
        DataError: naming what differs.
    """
    for key, name in RESUME_INVARIANTS.items():
        if saved.get(key, current[key]) != current[key]:
            raise DataError(f"{out}: {name} is not the same as when this run started")
