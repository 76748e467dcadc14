"""Refuse what cannot work, before the first costly second."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import torch

from shoulders.config.recipe import Recipe, Source, as_size, check_name
from shoulders.config.resume import check_resumed
from shoulders.config.user_code import check_function
from shoulders.distributed.context import DistContext
from shoulders.distributed.sharding import FSDP_SUPPORTED
from shoulders.errors import RecipeError
from shoulders.images import ImageSet
from shoulders.student.base import check_base
from shoulders.teachers import Teacher, check_teacher
from shoulders.teachers.heads import check_head
from shoulders.training.checkpoint import checkpoints
from shoulders.training.heldout import MIN_IMAGES, too_few
from shoulders.training.int8_check import check_int8


def check(recipe: Recipe, own: Mapping[str, Teacher], dist: DistContext, resume: bool) -> None:
    """Refuse what cannot work, before the first costly second.

    Raises:
        RecipeError: one line with the fix.
    """
    check_training(recipe, own, dist)
    check_out(recipe, resume)
    check_int8(recipe, dist.log)


def check_training(recipe: Recipe, own: Mapping[str, Teacher], dist: DistContext) -> None:
    """All that a run needs is there and goes together, wherever it will be written.

    Raises:
        RecipeError: one line with the fix.
    """
    check_teaching(recipe, own)
    check_cached(recipe)
    share = dist.world_size * recipe.train.accumulate
    if recipe.train.batch % share:
        raise RecipeError(
            f"train.batch: {recipe.train.batch} cannot be shared by {dist.world_size} ranks x "
            f"{recipe.train.accumulate} parts (train.accumulate); make it a multiple of {share}"
        )
    if recipe.train.parallel == "fsdp" and dist.world_size > 1:
        check_parts(recipe)
    check_reads(recipe)
    if recipe.train.tensorboard and find_spec("tensorboard") is None:
        raise RecipeError("train.tensorboard: tensorboard is not installed: pip install 'shoulders[tensorboard]'")
    for name in recipe.keep_heads:
        check_head(name, recipe.teachers[name])


def check_teaching(recipe: Recipe, own: Mapping[str, Teacher]) -> None:
    """There are images to see, teachers that can be asked about them, and a base.

    Raises:
        RecipeError: naming what is missing.
    """
    if not recipe.teachers and not own:
        raise RecipeError("teachers: none; name at least one model to learn from")
    if not recipe.images.all_sources():
        raise RecipeError("images: no path; give images.path=FOLDER on the command line, or path: in the recipe")
    for name, source in recipe.images.all_sources().items():
        check_source(name, source)
    check_sources(recipe, own)
    check_names(recipe, own)
    check_base(recipe.student, as_size(recipe.images.size), recipe.transfer.layers)
    for name, spec in recipe.teachers.items():
        check_teacher(name, spec)


def check_cached(recipe: Recipe) -> None:
    """A recipe that insists on its cache has one that can exist.

    Raises:
        RecipeError: with the fix.
    """
    if recipe.cache.mode != "require":
        return
    if recipe.cache.path is None:
        raise RecipeError("cache.mode: require, but cache.path is not given; name the folder of a cache")
    if recipe.images.views == "fresh":
        raise RecipeError(
            "cache.mode: require, but images.views is fresh: such views never end, and cannot be cached; give a number "
            "of them, such as images.views=4, or take cache.mode=auto"
        )


def check_source(name: str, source: Source) -> None:
    """Something is where the images should come from.

    Raises:
        RecipeError: there is nothing.
    """
    if source.path is not None and not source.path.exists():
        raise RecipeError(f"images: {source.path} ({name}) does not exist; give a folder, a parquet file or tar shards")
    if source.module is not None:
        try:
            check_function(source.module)
        except ValueError as error:
            raise RecipeError(f"images.sources.{name}.module: {error}") from error


def check_sources(recipe: Recipe, own: Mapping[str, Teacher]) -> None:
    """Every source teaches something; a warning where one lies in another.

    Raises:
        RecipeError: naming the source that teaches nothing.
    """
    sources = recipe.images.all_sources()
    asked = {source for home in recipe.teacher_sources.values() for source in home}
    if not own and not recipe.transfer.preserve and len(recipe.teacher_sources) == len(recipe.teachers):
        if idle := [name for name in sources if name not in asked]:
            raise RecipeError(
                f"images.sources: no teacher learns from {', '.join(idle)}, and transfer.preserve is 0: these "
                "images would teach nothing; leave them out, or add them to teachers.NAME.sources"
            )
    places = {name: source.path.resolve() for name, source in sources.items() if source.path is not None}
    for (one, inner), (other, outer) in permutations(places.items(), 2):
        if inner.is_relative_to(outer) and (inner != outer or one < other):
            warnings.warn(
                f"images.sources: {one} lies in {other}: its images come up in both, and some that are held out of one "
                "train in the other, so that held-out measures are too good; give folders beside each other",
                stacklevel=2,
            )


def check_heldout(recipe: Recipe, images: ImageSet) -> None:
    """Every teacher is asked about enough held-out images to be measured.

    Raises:
        DataError: naming the teacher.
    """
    heldout = images.collection.ids[images.heldout]
    for name in recipe.teachers:
        home = recipe.teacher_sources.get(name)
        count = len(heldout) if home is None else len(images.collection.indices_from(home, heldout))
        if count < MIN_IMAGES:
            raise too_few(name, count, len(heldout))


def check_names(recipe: Recipe, own: Mapping[str, Teacher]) -> None:
    """Names of teachers of your own follow the rules of those in a recipe, and are not taken.

    Raises:
        RecipeError: naming the one that does not.
    """
    for name in own:
        if name in recipe.teachers:
            raise RecipeError(f"teachers: {name!r} is both in the recipe and given from Python; rename one")
        check_name(name)


def check_parts(recipe: Recipe) -> None:
    """Models can be shared out in parts.

    Raises:
        RecipeError: with the way out.
    """
    if not FSDP_SUPPORTED:
        raise RecipeError(
            f"train.parallel: fsdp needs torch 2.13, not {torch.__version__}; install that, or take parallel=ddp"
        )
    if recipe.train.compile:
        raise RecipeError("train.compile: does not go with train.parallel=fsdp; leave it out, or take parallel=ddp")


def check_reads(recipe: Recipe) -> None:
    """Something must reach the last block, else a part of the adapter would never learn.

    Raises:
        RecipeError: with the ways out.
    """
    how = recipe.transfer
    if "latent" not in how.layers and (how.t2s == "none" or how.t2s_grad_to == "projector"):
        raise RecipeError("transfer.layers: without the latent nothing reaches the last block; add latent, or set t2s")


def check_out(recipe: Recipe, resume: bool) -> None:
    """The run folder can be made, holds no other run, or the very run that is to go on.

    Raises:
        RecipeError: saying which it is.
    """
    out = recipe.out
    check_writable("out", out)
    there = [*checkpoints(out / "checkpoints"), *out.glob("student")]
    if there and not resume:
        raise RecipeError(f"out: {out} holds a run already ({there[-1].name}); add --resume, or choose another out")
    if there:
        check_resumed(recipe, out / "recipe.yaml")


def check_writable(key: str, folder: Path) -> None:
    """A folder can be made and written to.

    Raises:
        RecipeError: naming the recipe's key.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RecipeError(f"{key}: cannot write to {above}; choose another {key}")
