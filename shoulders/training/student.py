"""The student before training: the base, a fresh adapter, a projector for every tap, and the heads that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoulders.config.recipe import Recipe
from shoulders.config.section import as_size
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.model import ShouldersConfig, ShouldersModel, build_student
from shoulders.student.base import Base, load_base
from shoulders.teachers import AnyTeachers, Tap
from shoulders.teachers.heads import Head, load_head
from shoulders.teachers.heads.post_process import check_processor
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import (
    FeatureDims,
    downsample_factors,
    module_name,
    teacher_name,
    upsample_factors,
)


def init_student(recipe: Recipe, teachers: AnyTeachers) -> ShouldersModel:
    """The base with a fresh adapter, and a projector and standardizer for every tap that the student learns from.

    Raises:
        RecipeError: two taps would have the same name in the student's weights.
    """
    base = load_base(recipe.student)
    check_tap_names(teachers.taps)
    return build_student(base.model, student_config(recipe, base, teachers))


def load_kept_heads(recipe: Recipe, teachers: AnyTeachers, dist: DistContext) -> dict[str, Head]:
    """The heads that the student keeps, from their teachers' own checkpoints; {} on ranks that do not write.

    Raises:
        RecipeError: a head cannot be separated from its teacher.
        DataError: weights of a head are missing or damaged.
    """
    heads = {name: load_head(name, recipe.teachers.get(name), teachers[name]) for name in recipe.keep_heads}
    for name, head in heads.items():
        try:
            check_processor(head)
        except RecipeError as error:  # the head can still be kept, and called from Python
            dist.log(f"keep_heads: {name}: {error}")
    return heads if dist.is_main else {}


def student_config(recipe: Recipe, base: Base, teachers: AnyTeachers) -> ShouldersConfig:
    """The config of a run's student; the preserved base is one of its teachers."""
    config = base.model.config
    dims = {tap: FeatureDims(shape.summary, shape.spatial) for tap, shape in teachers.taps.items()}
    if recipe.transfer.preserve:
        dims[f"{BASE}/latent"] = FeatureDims(config.hidden_size, config.hidden_size)
    provenance: dict[str, dict[str, Any]] = {name: dict(origin) for name, origin in teachers.provenance().items()}
    provenance[BASE] = {"source": recipe.student.base, "revision": base.revision, "license": base.license}
    return ShouldersConfig(
        base=config.to_dict(),
        adapter=recipe.student.adapter.model_dump(),
        mean=list(base.preprocessing.mean),
        std=list(base.preprocessing.std),
        image_size=list(as_size(recipe.images.size)),
        taps={tap: one._asdict() for tap, one in dims.items()},
        **grid_factors(recipe, teachers.taps, config.patch_size),
        layers=list(recipe.transfer.layers),
        projector_width=recipe.transfer.projector_width or 2 * config.hidden_size,
        standardize=recipe.transfer.standardize,
        teachers=provenance,
    )


def grid_factors(recipe: Recipe, taps: Mapping[str, Tap], patch_size: int) -> dict[str, dict[str, int]]:
    """``upsample`` and ``downsample`` of each tap: how its grid differs from the student's.

    Only the taps that a kept head reads, and those of ``match_grid``, are upsampled; the others are compared on the
    student's coarser grid.

    Raises:
        RecipeError: a tap of ``match_grid`` does not exist or has no grid.
    """
    height, width = as_size(recipe.images.size)
    grid = (height // patch_size, width // patch_size)
    grids = {tap: shape.grid for tap, shape in taps.items() if shape.spatial}
    kept = recipe.keep_heads if recipe.transfer.match_teacher_grid else []
    matched = [f"{name}/{tap}" for name, spec in recipe.teachers.items() for tap in spec.match_grid]
    if unknown := [tap for tap in matched if tap not in grids]:
        teacher = teacher_name(unknown[0])
        allowed = ", ".join(tap.split("/", 1)[1] for tap in grids if teacher_name(tap) == teacher) or "none"
        raise RecipeError(f"teachers.{teacher}.match_grid: {unknown[0]} has no grid here; taps with one: {allowed}")
    own_grid = {tap: size for tap, size in grids.items() if teacher_name(tap) in kept or tap in matched}
    return {"upsample": upsample_factors(grid, own_grid), "downsample": downsample_factors(grid, grids)}


def check_tap_names(taps: Mapping[str, Tap]) -> None:
    """Refuse taps whose names are the same as names of submodules.

    Raises:
        RecipeError: naming them.
    """
    names = [module_name(tap) for tap in taps]
    twins = [tap for tap in taps if names.count(module_name(tap)) > 1]
    if twins:
        raise RecipeError(f"{', '.join(twins)}: these names differ by a point or an underscore alone; rename one")
