"""All that a cached feature depends on, by value: no path, no date, and no weight is loaded to find it out.

A field is added here, or `FORMAT` is raised, whenever the same recipe begins to mean other features.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from shoulders.config.recipe import Recipe, Student, TeacherSpec, as_size
from shoulders.hub import Pretrained, find_file, read_json
from shoulders.images import ImageSet, longest_side, min_decode_side
from shoulders.student.base import base_layers_needed, read_base
from shoulders.teachers import Teacher, load_teacher
from shoulders.teachers.checkpoint import read_checkpoint
from shoulders.training.checkpoint import fingerprint as digest_of_weights
from shoulders.transfer.losses import BASE

FORMAT = 1
RENDERING = "bicubic, antialiased, uint8"  # what `shoulders.images.render` does
Fields = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """One teacher as a recipe asks for it.

    Args:
        folder: what its part of a cache is called.
        size: (h, w) in px that it is asked at.
        whose: its source, revision and license.
        fields: what its features depend on beside the views of the images.
    """

    folder: str
    size: Size
    whose: dict[str, str | None]
    fields: Fields


def asked_of(recipe: Recipe, extra_teachers: dict[str, Teacher]) -> dict[str, Asked]:
    """Every teacher of a recipe, and the base where it is to be preserved, or read by an adapter beside it.

    Raises:
        RecipeError: a model is not there, or not as the recipe says.
    """
    asked = {name: _of_spec(name, spec) for name, spec in recipe.teachers.items()}
    asked |= {name: _of_module(name, teacher) for name, teacher in extra_teachers.items()}
    if places := base_layers_needed(recipe.student, recipe.transfer.layers, bool(recipe.transfer.preserve)):
        asked[BASE] = _of_base(recipe.student, as_size(recipe.images.size), places)
    return asked


def fingerprints(recipe: Recipe, asked: dict[str, Asked], images: ImageSet, bf16: bool) -> dict[str, Fields]:
    """The fingerprint of each teacher's features of the views of the images it is asked about: plain data by field.

    Args:
        bf16: whether the teachers are asked in bfloat16.
    """
    sizes = sizes_of(recipe, asked)
    how, cache = recipe.images, recipe.cache
    ids, training = images.collection.ids, np.concatenate(list(images.training.values()))
    common: Fields = {
        "format": FORMAT,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "train.precision": "bf16" if bf16 else "fp32",  # what auto is on this machine
        "train.seed": recipe.train.seed,
        "images": _digest(np.sort(ids[training]).tobytes()),
        "images.heldout": _digest(np.sort(ids[images.heldout]).tobytes()),
        "images.views": how.views,
        "images.scale": list(how.scale),
        "images.flip": how.flip,
        "images.max_pixels": how.max_pixels,
        "decoded to at least": [min_decode_side(sizes, how.scale), longest_side(sizes)],
        "rendering": RENDERING,
        "cache.dtype": cache.dtype,
        "cache.pool": cache.pool,
        "cache.pca": cache.pca,
    }
    homes = {name: {"sources": sorted(set(home))} for name, home in recipe.teacher_sources.items()}
    return {name: {"teacher": name, **one.fields, **homes.get(name, {}), **common} for name, one in asked.items()}


def sizes_of(recipe: Recipe, asked: dict[str, Asked]) -> list[Size]:
    """All sizes (h, w) that a live run renders, the student's too: the largest decides how images are decoded."""
    return sorted({as_size(recipe.images.size), *(one.size for one in asked.values())})


def differences(old: Fields, new: Fields) -> list[str]:
    """One line for each field that differs: the field, what was cached, and what is asked for."""
    fields = [field for field in {**new, **old} if old.get(field) != new.get(field)]
    return [f"{field} was {_short(old.get(field))}, is {_short(new.get(field))}" for field in fields]


def _of_spec(name: str, spec: TeacherSpec) -> Asked:
    if spec.module is not None:
        return _of_module(name, load_teacher(name, spec))
    checkpoint = read_checkpoint(name, spec)
    pretrained, pixels = checkpoint.pretrained, checkpoint.preprocessing
    whose = {"source": pretrained.source, "revision": pretrained.revision, "license": checkpoint.license}
    fields = {
        **_of_files(pretrained),
        "size": list(pixels.size),
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "taps": list(checkpoint.taps),
        "int8": spec.int8 or None,
    }
    return Asked(name, pixels.size, whose, fields)


def _of_base(spec: Student, size: Size, places: tuple[str, ...]) -> Asked:
    pretrained, pixels = read_base(spec)
    whose = {"source": spec.base, "revision": pretrained.revision, "license": None}
    fields = {
        **_of_files(pretrained),
        "size": list(size),
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "taps": list(places),
    }
    # students that read other places share the teachers: each has a folder of its own for the base
    folder = BASE if places == ("latent",) else ".".join((BASE, *places))
    return Asked(folder, size, whose, fields)


def _of_files(pretrained: Pretrained) -> Fields:
    """What the files of a pretrained model say of it; those of its weights are read, but not loaded."""
    index = read_json(pretrained, "model.safetensors.index.json")
    single = find_file(pretrained, "model.safetensors")
    names = sorted(set(index["weight_map"].values())) if index and not single else ["model.safetensors"]
    weights, config = [find_file(pretrained, name) for name in names], find_file(pretrained, "config.json")
    missing = [name for name, path in zip(names, weights, strict=True) if path is None]
    if missing or config is None:
        raise pretrained.error(f"has no {', '.join(missing)}; give a folder with weights")
    code = sorted(config.parent.glob("*.py"))
    return {
        "weights": [_sha256(path) for path in weights if path],
        "config": [_sha256(path) for path in [config, *code]],
        "revision": pretrained.revision,
    }


def _of_module(name: str, teacher: Teacher) -> Asked:
    """A module of the user's own: its weights, and the code of its class as far as that can be read."""
    kind = type(teacher.module)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        code = repr(teacher.module)
    whose = {"source": teacher.source, "revision": teacher.revision, "license": teacher.license}
    fields = {
        "weights": [digest_of_weights(teacher)],
        "config": [_digest(kind.__qualname__, code)],
        "revision": teacher.revision,
        "size": list(teacher.size),
        "mean": teacher.mean.flatten().tolist(),
        "std": teacher.std.flatten().tolist(),
        "taps": list(teacher.taps),
    }
    return Asked(name, teacher.size, whose, fields)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _read_sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _read_sha256(path: Path, size: int, changed: int) -> str:
    """Remembered within one process, for as long as size and date stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value[0] if isinstance(value, list) and len(value) == 1 else value)
    return text if len(text) <= 40 else f"{text[:12]}.."
