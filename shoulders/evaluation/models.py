"""The models of a run that are evaluated: which ones, and their features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from shoulders.config.recipe import Recipe, read_recipe
from shoulders.config.sections import TeacherSpec
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.features import FeaturesOf
from shoulders.inference import concatenated_teachers, features_of_student, features_of_teacher, input_size
from shoulders.model import load
from shoulders.tasks import Task
from shoulders.tasks.skipped import max_unreadable
from shoulders.teachers import Teacher, check_teacher, load_teacher

STUDENTS = ("student", "base")  # these have an adapter
MODELS = (*STUDENTS, "teachers")
CONCATENATED = "concatenated"  # the features of all teachers side by side
BASELINE = "scratch"  # the student's architecture, trained from scratch with labels


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose features are evaluated.

    Args:
        name: in rows.
        sizes: (h, w) in px of its inputs.
        features_of: Features of a batch that is rendered at these sizes.
        widths: of several models side by side, see `shoulders.tasks.vector_probes.LabelledVectors`.
        settings: for its rows.
    """

    name: str
    sizes: list[tuple[int, int]]
    features_of: FeaturesOf
    widths: tuple[int, ...] = ()
    settings: dict[str, float | int | str] = field(default_factory=dict)


def recipe_of_run(run: Path) -> Recipe | None:
    """The recipe of a run folder; None in the folder of a student alone."""
    return read_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None


def skip_limit(recipe: Recipe | None, fraction: float | None) -> AbstractContextManager[None]:
    """A context that limits which fraction of labelled images may be unreadable; default: that of the run's recipe."""
    fraction = recipe.images.max_unreadable if fraction is None and recipe else fraction
    return nullcontext() if fraction is None else max_unreadable(fraction)


def check_models(
    models: Sequence[str], recipe: Recipe | None, known: Sequence[str] = (*MODELS, CONCATENATED, BASELINE)
) -> None:
    """Refuse names that are no models of a run.

    Args:
        known: all that can be chosen beside names of teachers.

    Raises:
        RecipeError: naming them, and those that can be chosen; or there is no teacher to concatenate.
    """
    known = (*known, *(recipe.teachers if recipe else ()))
    if unknown := [name for name in models if name not in known]:
        raise RecipeError(f"--models: no {', '.join(unknown)} in this run; choose from {', '.join(known)}")
    if CONCATENATED in models and not (recipe and recipe.teachers):
        raise RecipeError(f"--models: {CONCATENATED} needs the teachers of a run, and there are none; leave it out")


def check_finetune(finetune: str | None, models: Sequence[str]) -> None:
    """Refuse to finetune anything but adapters.

    Raises:
        RecipeError: with what is allowed.
    """
    if finetune not in (None, "adapter"):
        raise RecipeError(f"--finetune: {finetune!r} cannot be finetuned; only adapter can")
    if finetune and (without := [name for name in models if name not in STUDENTS]):
        raise RecipeError(f"--finetune: {', '.join(without)} has no adapter; choose --models from student, base")


def teachers_side_by_side(
    run: Path, recipe: Recipe | None, models: Sequence[str], task: Task
) -> dict[str, TeacherSpec]:
    """The teachers of `CONCATENATED`, if it is among the models: all of the run whose features a task can use.

    Raises:
        RecipeError: the checkpoint of one is missing or changed, or none has the spatial features that the task needs.
    """
    teachers = chosen_teachers(run, recipe, MODELS) if CONCATENATED in models else {}
    if not teachers or not task.needs_spatial:
        return teachers
    usable = {name: spec for name, spec in teachers.items() if _has_spatial(load_teacher(name, spec))}
    if not usable:
        raise RecipeError(f"--models: {CONCATENATED} has no spatial features, which {task.name} needs; leave it out")
    if without := [name for name in teachers if name not in usable]:
        warnings.warn(f"{CONCATENATED}: without {', '.join(without)}, which has no spatial features", stacklevel=3)
    return usable


def _has_spatial(teacher: Teacher) -> bool:
    return any(tap.spatial is not None for tap in teacher.taps.values())


def chosen_teachers(
    run: Path, recipe: Recipe | None, models: Sequence[str], with_heads: bool = False
) -> dict[str, TeacherSpec]:
    """The teachers among the models, all of which can be loaded.

    Args:
        with_heads: only those whose heads the student keeps.

    Raises:
        RecipeError: the checkpoint of one is missing or changed.
    """
    teachers = recipe.teachers if recipe else {}
    chosen = {name: spec for name, spec in teachers.items() if "teachers" in models or name in models}
    if recipe and with_heads:
        chosen = {name: spec for name, spec in chosen.items() if name in recipe.keep_heads}
    for name, spec in chosen.items():
        try:
            check_teacher(name, spec)
        except RecipeError as error:
            raise RecipeError(
                f"{run / 'recipe.yaml'}: {error}; run the command in the folder where the run was started, or leave "
                "the teacher out: --models student,base"
            ) from error
    return chosen


def check_spatial(teachers: Mapping[str, TeacherSpec], task: Task) -> None:
    """Refuse a teacher without the spatial features that a task needs, before any model is evaluated.

    Raises:
        RecipeError: naming it.
    """
    for name, spec in teachers.items() if task.needs_spatial else ():
        if not _has_spatial(load_teacher(name, spec)):
            raise RecipeError(
                f"teachers.{name}: has no spatial features, which {task.name} needs; leave it out of --models"
            )


def models_with_features(
    run: Path,
    models: Sequence[str],
    teachers: Mapping[str, TeacherSpec],
    side_by_side: Mapping[str, TeacherSpec],
    spatial: bool,
    size: tuple[int, int] | None,
) -> Iterator[EvaluatedModel]:
    """Each model; one is in memory at a time, but the teachers ``side_by_side`` are together."""
    device = this_device()
    for name in models:
        if name in STUDENTS:
            student = load(run).to(device)
            px = input_size(student, size)
            yield EvaluatedModel(name, [px], features_of_student(student, px, base=name == "base"))
    for name, spec in teachers.items():
        teacher = load_teacher(name, spec).to(device)
        yield EvaluatedModel(name, [teacher.size], features_of_teacher(teacher, spatial))
    if side_by_side:
        yield _concatenated({name: load_teacher(name, spec).to(device) for name, spec in side_by_side.items()}, spatial)


def _concatenated(teachers: Mapping[str, Teacher], spatial: bool) -> EvaluatedModel:
    sizes = list(dict.fromkeys(teacher.size for teacher in teachers.values()))
    last_taps = [list(teacher.taps.values())[-1] for teacher in teachers.values()]
    widths = () if spatial else tuple(tap.summary or tap.spatial or 0 for tap in last_taps)
    features_of = concatenated_teachers(list(teachers.values()), spatial)
    return EvaluatedModel(CONCATENATED, sizes, features_of, widths, {"teachers": ", ".join(teachers)})
