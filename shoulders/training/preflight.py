"""Checks before a run: a recipe that cannot work is refused before any weight is loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import torch

from shoulders.config.recipe import Recipe, check_name
from shoulders.config.resume import check_resumed
from shoulders.config.section import as_size
from shoulders.config.sections import Source
from shoulders.config.user_code import check_function
from shoulders.distributed.context import DistContext
from shoulders.distributed.sharding import FSDP_SUPPORTED
from shoulders.errors import RecipeError
from shoulders.images import ImageSet
from shoulders.student.base import check_base
from shoulders.teachers import Teacher, check_pure, check_teacher
from shoulders.teachers.heads import check_head, load_module_head
from shoulders.training.checkpoint import checkpoints
from shoulders.training.heldout import MIN_IMAGES, too_few
from shoulders.training.int8_check import check_int8


def check_run(recipe: Recipe, extra_teachers: Mapping[str, Teacher], dist: DistContext, resume: bool) -> None:
    """Refuse a run that cannot work.

    Raises:
        RecipeError: one line with the fix.
    """
    check_training(recipe, extra_teachers, dist)
    check_out(recipe, resume)
    check_int8(recipe, dist.log)


def check_training(recipe: Recipe, extra_teachers: Mapping[str, Teacher], dist: DistContext) -> None:
    """Refuse a recipe whose inputs are missing or whose settings do not fit together, whatever its ``out`` is.

    Raises:
        RecipeError: one line with the fix.
    """
    check_inputs(recipe, extra_teachers)
    check_cache_mode(recipe)
    micro_batches = dist.world_size * recipe.train.accumulate
    if recipe.train.batch % micro_batches:
        raise RecipeError(
            f"train.batch: {recipe.train.batch} cannot be divided among {dist.world_size} ranks x "
            f"{recipe.train.accumulate} micro-batches (train.accumulate); make it a multiple of {micro_batches}"
        )
    if recipe.train.parallel == "fsdp" and dist.world_size > 1:
        check_fsdp(recipe)
    check_layers(recipe)
    if recipe.train.tensorboard and find_spec("tensorboard") is None:
        raise RecipeError("train.tensorboard: tensorboard is not installed: pip install 'shoulders[tensorboard]'")
    for name in recipe.keep_heads:
        if name in recipe.teachers:
            check_head(name, recipe.teachers[name])
        else:
            load_module_head(name, extra_teachers[name])


def check_inputs(recipe: Recipe, extra_teachers: Mapping[str, Teacher]) -> None:
    """Refuse a recipe whose images, teachers or base are missing or cannot be used.

    Raises:
        RecipeError: naming what is missing.
    """
    if not recipe.teachers and not extra_teachers:
        raise RecipeError("teachers: none; name at least one model to learn from")
    if not recipe.images.all_sources():
        raise RecipeError("images: no path; give images.path=FOLDER on the command line, or path: in the recipe")
    for name, source in recipe.images.all_sources().items():
        check_source(name, source)
    check_sources(recipe, extra_teachers)
    check_names(recipe, extra_teachers)
    check_base(recipe.student, as_size(recipe.images.size), recipe.transfer.layers)
    for name, spec in recipe.teachers.items():
        check_teacher(name, spec)
    for name, teacher in extra_teachers.items():
        check_pure(name, teacher)


def check_cache_mode(recipe: Recipe) -> None:
    """Refuse ``cache.mode: require`` without a cache that can exist.

    Raises:
        RecipeError: with the fix.
    """
    if recipe.cache.mode != "require":
        return
    if recipe.cache.path is None:
        raise RecipeError("cache.mode: require, but cache.path is not given; name the folder of a cache")
    if recipe.images.views == "fresh":
        raise RecipeError(
            "cache.mode: require, but images.views is fresh: there is no end of such views, and they cannot be cached; "
            "give a number of views, such as images.views=4, or set cache.mode=auto"
        )


def check_source(name: str, source: Source) -> None:
    """Refuse a source that does not exist.

    Raises:
        RecipeError: naming it.
    """
    if source.path is not None and not source.path.exists():
        raise RecipeError(f"images: {source.path} ({name}) does not exist; give a folder, a parquet file or tar shards")
    if source.module is not None:
        try:
            check_function(source.module)
        except ValueError as error:
            raise RecipeError(f"images.sources.{name}.module: {error}") from error


def check_sources(recipe: Recipe, extra_teachers: Mapping[str, Teacher]) -> None:
    """Refuse a source that no teacher uses; warn where one source contains another.

    Raises:
        RecipeError: naming the source that no teacher uses.
    """
    sources = recipe.images.all_sources()
    every_teacher_is_limited = not extra_teachers and len(recipe.teacher_sources) == len(recipe.teachers)
    if every_teacher_is_limited and not recipe.transfer.preserve:
        used = {source for names in recipe.teacher_sources.values() for source in names}
        if unused := [name for name in sources if name not in used]:
            raise RecipeError(
                f"images.sources: no teacher uses {', '.join(unused)}, and transfer.preserve is 0: nothing can be "
                "learned from these images; leave them out, or add them to teachers.NAME.sources"
            )
    paths = {name: source.path.resolve() for name, source in sources.items() if source.path is not None}
    for (one, inner), (other, outer) in permutations(paths.items(), 2):
        if inner.is_relative_to(outer) and (inner != outer or one < other):
            warnings.warn(
                f"images.sources: {one} is inside {other}: its images belong to both, and some that are held out of "
                "one are training images of the other, so that held-out measures are too good; give separate folders",
                stacklevel=2,
            )


def check_heldout(recipe: Recipe, images: ImageSet) -> None:
    """Refuse a set of images with too few held-out images for one of the teachers.

    Raises:
        DataError: naming the teacher.
    """
    heldout = images.collection.ids[images.heldout]
    for name in recipe.teachers:
        sources = recipe.teacher_sources.get(name)
        count = len(heldout) if sources is None else len(images.collection.indices_from(sources, heldout))
        if count < MIN_IMAGES:
            raise too_few(name, count, len(heldout))


def check_names(recipe: Recipe, extra_teachers: Mapping[str, Teacher]) -> None:
    """Refuse a name of an extra teacher that is invalid or stands in the recipe, and a kept head of no teacher.

    Raises:
        RecipeError: naming it.
    """
    for name in extra_teachers:
        if name in recipe.teachers:
            raise RecipeError(f"teachers: {name!r} is both in the recipe and given from Python; rename one")
        check_name(name)
    teachers = {**recipe.teachers, **extra_teachers}
    if unknown := [name for name in recipe.keep_heads if name not in teachers]:
        raise RecipeError(f"keep_heads: {', '.join(unknown)} not among teachers: {', '.join(teachers)}")


def check_fsdp(recipe: Recipe) -> None:
    """Refuse ``train.parallel: fsdp`` where it cannot work.

    Raises:
        RecipeError: with the alternative.
    """
    if not FSDP_SUPPORTED:
        raise RecipeError(
            f"train.parallel: fsdp needs torch 2.13, not {torch.__version__}; install that version, or set parallel=ddp"
        )
    if recipe.train.compile:
        raise RecipeError("train.compile: does not work with train.parallel=fsdp; leave it out, or set parallel=ddp")


def check_layers(recipe: Recipe) -> None:
    """Refuse layers without a gradient for the last block: a part of the adapter would not be trained.

    Raises:
        RecipeError: with the alternatives.
    """
    transfer = recipe.transfer
    latent_is_unused = transfer.t2s == "none" or transfer.t2s_grad_to == "projector"
    if "latent" not in transfer.layers and latent_is_unused:
        raise RecipeError(
            "transfer.layers: without the latent no gradient reaches the last block; add latent, or set t2s"
        )


def check_out(recipe: Recipe, resume: bool) -> None:
    """Refuse a run folder that cannot be written, or that holds another run than the one to resume.

    Raises:
        RecipeError: naming the reason.
    """
    out = recipe.out
    check_writable("out", out)
    existing = [*checkpoints(out / "checkpoints"), *out.glob("student")]
    if existing and not resume:
        raise RecipeError(f"out: {out} holds a run already ({existing[-1].name}); add --resume, or choose another out")
    if existing:
        check_resumed(recipe, out / "recipe.yaml")


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        RecipeError: naming the recipe's key.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RecipeError(f"{key}: cannot write to {existing}; choose another {key}")
