"""Ranks with different recipes, images or weights are refused: they would train a student of neither."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from shoulders.config.recipe import Recipe
from shoulders.config.resume import flatten
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.images import ImageSet
from shoulders.model import ShouldersModel
from shoulders.teachers import AnyTeachers, Teachers
from shoulders.training.checkpoint import fingerprint

FREE_ON_RANKS = ("images.workers",)
SAME_RECIPE = "start every rank with the same recipe and options"
SAME_FILES = "give every rank the same files"


def check_same_recipe(recipe: Recipe, extra_teachers: Iterable[str], resume: bool, dist: DistContext) -> None:
    """Refuse ranks with different recipes or options.

    Raises:
        RecipeError: on every rank, naming the first key that differs.
    """
    keys = {key: value for key, value in flatten(recipe.model_dump(mode="json")).items() if key not in FREE_ON_RANKS}
    options = {"teachers from Python": list(extra_teachers), "--resume": resume}
    # the order of teachers and sources counts too
    orders = {"order of teachers": list(recipe.teachers), "order of images.sources": list(recipe.images.sources)}
    _compare(keys | options | orders, SAME_RECIPE, dist)


def check_same_inputs(teachers: AnyTeachers, student: ShouldersModel, images: ImageSet, dist: DistContext) -> None:
    """Refuse ranks with different images, weights, caches or precision.

    Raises:
        RecipeError: on every rank, naming the first part that differs.
    """
    if dist.world_size == 1:
        return
    dist.barrier()  # one rank may have loaded its models long before another
    parts = {"images": hashlib.sha256(images.collection.ids.tobytes()).hexdigest(), "train.precision": teachers.bf16}
    if isinstance(teachers, Teachers):
        parts |= {f"teachers.{name}": fingerprint(teachers[name]) for name in teachers.selected}
    else:
        parts["cache.path"] = fingerprint(teachers)
    settings = teachers.taps, teachers.sizes, teachers.preprocessing()
    parts |= {"student.base": fingerprint(student.encoder.base), "teachers": fingerprint(settings=settings)}
    _compare(parts, SAME_FILES, dist)


def _compare(parts: Mapping[str, object], fix: str, dist: DistContext) -> None:
    first, *others = dist.gather(dict(parts))
    for rank, other in enumerate(others, 1):
        for key in [*first, *(key for key in other if key not in first)]:
            if first.get(key) != other.get(key):
                raise RecipeError(f"{key}: differs between ranks 0 and {rank}{_values(first, other, key)}; {fix}")


def _values(first: Mapping[str, object], other: Mapping[str, object], key: str) -> str:
    """The two values, unless they are hashes."""
    values = [part.get(key, "nothing") for part in (first, other)]
    if any(isinstance(value, str) and len(value) == 2 * hashlib.sha256().digest_size for value in values):
        return ""
    return f" ({values[0]!r} and {values[1]!r})"
