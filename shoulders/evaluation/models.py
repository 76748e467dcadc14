"""The models of a run that are evaluated: which ones, and their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from shoulders.config.recipe import Recipe, read_recipe
from shoulders.config.sections import TeacherSpec
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.features import FeaturesOf
from shoulders.inference import features_of_student, features_of_teacher, input_size
from shoulders.model import load
from shoulders.tasks import Task
from shoulders.tasks.skipped import max_unreadable
from shoulders.teachers import check_teacher, load_teacher

STUDENTS = ("student", "base")  # these have an adapter
MODELS = (*STUDENTS, "teachers")
BASELINE = "scratch"  # the student's architecture, trained from scratch with labels


def recipe_of_run(run: Path) -> Recipe | None:
    """The recipe of a run folder; None in the folder of a student alone."""
    return read_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None


def skip_limit(recipe: Recipe | None, fraction: float | None) -> AbstractContextManager[None]:
    """A context that limits which fraction of labelled images may be unreadable; default: that of the run's recipe."""
    fraction = recipe.images.max_unreadable if fraction is None and recipe else fraction
    return nullcontext() if fraction is None else max_unreadable(fraction)


def check_models(models: Sequence[str], recipe: Recipe | None) -> None:
    """Refuse names that are no models of a run.

    Raises:
        RecipeError: naming them, and those that can be chosen.
    """
    known = (*MODELS, BASELINE, *(recipe.teachers if recipe else ()))
    if unknown := [name for name in models if name not in known]:
        raise RecipeError(f"--models: no {', '.join(unknown)} in this run; choose from {', '.join(known)}")


def check_finetune(finetune: str | None, models: Sequence[str]) -> None:
    """Refuse to finetune anything but adapters.

    Raises:
        RecipeError: with what is allowed.
    """
    if finetune not in (None, "adapter"):
        raise RecipeError(f"--finetune: {finetune!r} cannot be finetuned; only adapter can")
    if finetune and (without := [name for name in models if name not in STUDENTS]):
        raise RecipeError(f"--finetune: {', '.join(without)} has no adapter; choose --models from student, base")


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
        if all(tap.spatial is None for tap in load_teacher(name, spec).taps.values()):
            raise RecipeError(
                f"teachers.{name}: has no spatial features, which {task.name} needs; leave it out of --models"
            )


def models_with_features(
    run: Path, models: Sequence[str], teachers: Mapping[str, TeacherSpec], spatial: bool, size: tuple[int, int] | None
) -> Iterator[tuple[str, tuple[int, int], FeaturesOf]]:
    """(name, input size, features of a batch) of each model; one is in memory at a time."""
    device = this_device()
    for name in models:
        if name in STUDENTS:
            student = load(run).to(device)
            px = input_size(student, size)
            yield name, px, features_of_student(student, px, base=name == "base")
    for name, spec in teachers.items():
        teacher = load_teacher(name, spec).to(device)
        yield name, teacher.size, features_of_teacher(teacher, spatial)
