"""Everything that cached features depend on, by value: no path, no date, and no weights are loaded for it.

Add a field, or raise `FORMAT`, whenever the same recipe starts to give other features.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from shoulders.config.recipe import Recipe
from shoulders.config.section import as_size
from shoulders.config.sections import TeacherSpec
from shoulders.config.student import Student
from shoulders.hub import Pretrained, find_file, weight_paths
from shoulders.images import ImageSet, longest_side, min_decode_side
from shoulders.student.base import base_layers_needed, read_base
from shoulders.teachers import Teacher, load_teacher
from shoulders.teachers.checkpoint import read_checkpoint
from shoulders.training.checkpoint import fingerprint as digest_of_weights
from shoulders.transfer.losses import BASE

FORMAT = 2
RENDERING = "bicubic, antialiased, uint8"  # of `shoulders.images.render`
MAX_VALUE_CHARS = 40  # of a field in an error message
Fingerprint = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class CacheEntry:
    """One teacher of a cache.

    Args:
        folder: name of its folder in the cache.
        size: (h, w) in px of the images that it receives.
        provenance: its source, revision and license.
        fields: the part of its fingerprint that does not depend on the images.
    """

    folder: str
    size: Size
    provenance: dict[str, str | None]
    fields: Fingerprint


def cache_entries(recipe: Recipe, extra_teachers: Mapping[str, Teacher]) -> dict[str, CacheEntry]:
    """All teachers of a recipe, and the base if it is preserved or an adapter needs its features.

    Raises:
        RecipeError: a model does not exist, or does not fit the recipe.
    """
    entries = {name: _of_spec(name, spec) for name, spec in recipe.teachers.items()}
    entries |= {name: _of_module(name, teacher) for name, teacher in extra_teachers.items()}
    if layers := base_layers_needed(recipe.student, recipe.transfer.layers, bool(recipe.transfer.preserve)):
        entries[BASE] = _of_base(recipe.student, as_size(recipe.images.size), layers)
    return entries


def fingerprints(
    recipe: Recipe, entries: Mapping[str, CacheEntry], images: ImageSet, bf16: bool
) -> dict[str, Fingerprint]:
    """The fingerprint of each teacher's features of the views of its images: plain data by field.

    Args:
        recipe: gives the settings of images and cache.
        entries: see `cache_entries`.
        images: of the recipe.
        bf16: whether the teachers run in bfloat16.
    """
    sizes = all_sizes(recipe, entries)
    settings, cache = recipe.images, recipe.cache
    ids, training = images.collection.ids, np.concatenate(list(images.training.values()))
    common: Fingerprint = {
        "format": FORMAT,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "train.precision": "bf16" if bf16 else "fp32",  # auto differs between machines
        "train.seed": recipe.train.seed,
        "images": _digest(np.sort(ids[training]).tobytes()),
        "images.heldout": _digest(np.sort(ids[images.heldout]).tobytes()),
        "images.views": settings.views,
        "images.scale": list(settings.scale),
        "images.flip": settings.flip,
        "images.max_pixels": settings.max_pixels,
        "images.decoded_side": [min_decode_side(sizes, settings.scale), longest_side(sizes)],
        "rendering": RENDERING,
        "cache.dtype": cache.dtype,
        "cache.pool": cache.pool,
        "cache.pca": cache.pca,
    }
    sources = {name: {"sources": sorted(set(names))} for name, names in recipe.teacher_sources.items()}
    return {
        name: {"teacher": name, **entry.fields, **sources.get(name, {}), **common} for name, entry in entries.items()
    }


def all_sizes(recipe: Recipe, entries: Mapping[str, CacheEntry]) -> list[Size]:
    """All sizes (h, w) that a run without a cache renders: the largest decides how large images are decoded."""
    return sorted({as_size(recipe.images.size), *(entry.size for entry in entries.values())})


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """One line for each field that differs: its name, its cached value and its value in the recipe."""
    fields = [field for field in {**new, **old} if old.get(field) != new.get(field)]
    return [f"{field} was {_shorten(old.get(field))}, is {_shorten(new.get(field))}" for field in fields]


def _of_spec(name: str, spec: TeacherSpec) -> CacheEntry:
    if spec.module is not None:
        return _of_module(name, load_teacher(name, spec))
    checkpoint = read_checkpoint(name, spec)
    pretrained, preprocessing = checkpoint.pretrained, checkpoint.preprocessing
    provenance = {"source": pretrained.source, "revision": pretrained.revision, "license": checkpoint.license}
    fields = {
        **_of_files(pretrained),
        "size": list(preprocessing.size),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "taps": list(checkpoint.taps),
        "int8": spec.int8 or None,
    }
    return CacheEntry(name, preprocessing.size, provenance, fields)


def _of_base(spec: Student, size: Size, layers: tuple[str, ...]) -> CacheEntry:
    pretrained, preprocessing = read_base(spec)
    provenance = {"source": spec.base, "revision": pretrained.revision, "license": None}
    fields = {
        **_of_files(pretrained),
        "size": list(size),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "taps": list(layers),
    }
    # students that need other layers of the base share the teachers of a cache, but not the folder of the base
    folder = BASE if layers == ("latent",) else ".".join((BASE, *layers))
    return CacheEntry(folder, size, provenance, fields)


def _of_files(pretrained: Pretrained) -> Fingerprint:
    """Digests of the files of a pretrained model; the weights are hashed, not loaded."""
    weights, config = weight_paths(pretrained), find_file(pretrained, "config.json")
    if config is None:
        raise pretrained.error("has no config.json; give a folder written by save_pretrained")
    code = sorted(config.parent.glob("*.py"))
    return {
        "weights": [_sha256(path) for path in weights],
        "config": [_sha256(path) for path in [config, *code]],
        "revision": pretrained.revision,
    }


def _of_module(name: str, teacher: Teacher) -> CacheEntry:
    """A module of the user: its weights, and the source code of its class if that can be read."""
    kind = type(teacher.module)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        code = repr(teacher.module)
    provenance = {"source": teacher.source, "revision": teacher.revision, "license": teacher.license}
    fields = {
        "weights": [digest_of_weights(teacher)],
        "config": [_digest(kind.__qualname__, code)],
        "revision": teacher.revision,
        "size": list(teacher.size),
        "mean": teacher.mean.flatten().tolist(),
        "std": teacher.std.flatten().tolist(),
        "taps": list(teacher.taps),
    }
    return CacheEntry(name, teacher.size, provenance, fields)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _read_sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _read_sha256(path: Path, size: int, modified_ns: int) -> str:
    """Kept in memory as long as size and date of the file stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _shorten(value: Any) -> str:
    text = str(value[0] if isinstance(value, list) and len(value) == 1 else value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:12]}.."
