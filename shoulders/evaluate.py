"""Measure a run's student, its base and its teachers on a task, all by the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.errors import RecipeError
from shoulders.features import Batch, Features
from shoulders.grafts import load_graft, taps_of
from shoulders.heads import Fed, task_of
from shoulders.journal import keep_rows
from shoulders.model import load
from shoulders.ranks import this_device
from shoulders.recipe import TeacherSpec, as_size, read_recipe
from shoulders.tasks import TASKS
from shoulders.tasks.inherited import HEADS
from shoulders.teachers import Teacher, load_teacher

WHO = ("student", "base", "teachers")
FINEST_STRIDE = 8  # px of a teacher's input between the places that a dense probe sees
FeaturesOf = Callable[[Batch], Features]


def evaluate(
    run: Path | str, task: str, data: Path | str, models: Sequence[str] = WHO, *, column: str = "image",
    batch: int = 64, workers: int = 1, seed: int = 0, on_model: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of model, task, metric, value (a fraction from 0 to 1), n, seconds and settings.

    Args:
        run: a run folder, or a student's folder (then there are no teachers to ask).
        task: a name in ``shoulders.tasks.TASKS``.
        data: labelled images; see ``find_splits``, ``find_masks`` and ``find_objects`` in ``shoulders.tasks``.
        models: any of ``student``, ``base``, ``teachers``, or a teacher's name.
        on_model: called with each model's name before it is measured.

    Each model's rows also replace those of the same task, data, model and metric in ``results.json`` of the run
    folder as soon as it is measured.

    Raises:
        RecipeError: for a task, model or path that does not exist, or a teacher without what the task needs.
        DataError: if the student or the data cannot be used.
    """
    run = Path(run)
    if task not in TASKS:
        raise RecipeError(f"--task: {task!r} is not one of {', '.join(TASKS)}")
    is_run = (run / "recipe.yaml").is_file()
    specs = read_recipe(run / "recipe.yaml").teachers if is_run else {}
    unknown = [name for name in models if name not in (*WHO, *specs)]
    if unknown:
        raise RecipeError(f"--models: {', '.join(unknown)} not here; choose from {', '.join((*WHO, *specs))}")
    asked = {name: spec for name, spec in specs.items() if "teachers" in models or name in models}
    splits = TASKS[task].find(data, column)
    if TASKS[task].spatial:
        for name, spec in asked.items():
            _check_spatial(name, spec, task)
    rows = []
    for name, size, features_of in _chosen(run, models, asked, TASKS[task].spatial):
        on_model(name)
        measured = TASKS[task].run(features_of, splits, [size], batch, workers, seed)
        new = [{"model": name, **row, "data": str(Path(data).resolve()), "seed": seed} for row in measured]
        if is_run:
            keep_rows(run / "results.json", new)
        rows += new
    return rows


def evaluate_heads(
    run: Path | str, task: str, data: Path | str, models: Sequence[str] = WHO, *, column: str = "image",
    batch: int = 64, workers: int = 1, on_model: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows as of `evaluate`, with ``head``: heads that answer a task, on their teachers' and the student's features.

    Nothing is fitted. The student is asked through the heads that it keeps, teachers through their own.

    Raises:
        RecipeError: as `evaluate`, or no head here answers the task.
        DataError: if the student, a head or the data cannot be used.
    """
    run = Path(run)
    if task not in TASKS:
        raise RecipeError(f"--task: {task!r} is not one of {', '.join(TASKS)}")
    is_run = (run / "recipe.yaml").is_file()
    splits = TASKS[task].find(data, column)
    rows: list[dict[str, Any]] = []
    for name, head, fed in _heads(run, read_recipe(run / "recipe.yaml").teachers if is_run else {}, models):
        if task_of(fed.graft) == task:
            on_model(f"{name}, head of {head}")
            new = [{"model": name, "head": head, **row} for row in HEADS[task](fed, splits, batch, workers)]
            rows += [{**row, "data": str(Path(data).resolve()), "seed": 0} for row in new]
    if not rows:
        raise RecipeError(f"--heads: none of these heads answers {task}; name teachers in keep_heads: of the recipe")
    if is_run:
        keep_rows(run / "results.json", rows)
    return rows


def _heads(run: Path, specs: Mapping[str, TeacherSpec], models: Sequence[str]) -> Iterator[tuple[str, str, Fed]]:
    """(who gives the features, whose head it is, both together)."""
    device = this_device()
    student = load(run).to(device)
    for name in student.heads if "student" in models else ():
        graft = student.head(name)
        size = as_size(tuple(student.config.image_size))
        yield "student", name, Fed(graft, size, lambda x, name=name: taps_of(name, student.inherit(x.to(device))))  # type: ignore[misc]
    for name, spec in specs.items():
        if name in student.heads and ("teachers" in models or name in models):
            teacher = load_teacher(name, spec).to(device)
            graft = load_graft(name, spec, teacher).to(device)
            yield name, name, Fed(graft, teacher.size, lambda x, teacher=teacher: teacher(x.to(device)))  # type: ignore[misc]


def _check_spatial(name: str, spec: TeacherSpec, task: str) -> None:
    """Refuse a teacher that says nothing of places, before any model is measured."""
    if all(tap.spatial is None for tap in load_teacher(name, spec).taps.values()):
        raise RecipeError(f"teachers.{name}: has no spatial features, which {task} needs; leave it out of --models")


def _chosen(
    run: Path, models: Sequence[str], teachers: Mapping[str, TeacherSpec], spatial: bool
) -> Iterator[tuple[str, tuple[int, int], FeaturesOf]]:
    """(name, input size, features of a batch) for each model asked for; one is in memory at a time."""
    device = this_device()
    for name in models:
        if name in ("student", "base"):
            student = load(run).to(device)
            size = as_size(tuple(student.config.image_size))

            def of_student(batch: Batch, size: tuple[int, int] = size, base: bool = name == "base") -> Features:
                pixels = batch.to(device).pixels(size)
                if not base:
                    return student.encoder(pixels)["latent"]  # noqa: B023  (used before the next model is loaded)
                with student.encoder.off():  # noqa: B023
                    return student.encoder(pixels)["latent"]  # noqa: B023

            yield name, size, of_student
    for name, spec in teachers.items():
        teacher = load_teacher(name, spec).to(device)
        yield name, teacher.size, _places_of(teacher, device) if spatial else _of_teacher(teacher, device)


def _of_teacher(teacher: Teacher, device: torch.device) -> FeaturesOf:
    """A teacher's last tap: the summary where it has one, else its spatial features."""
    last = list(teacher.taps)[-1]
    return lambda batch: teacher(batch.to(device).pixels(teacher.size))[last]


def _places_of(teacher: Teacher, device: torch.device) -> FeaturesOf:
    """The spatial features of all taps side by side, on the finest grid among them that is no finer than 8 px."""
    grids = sorted(tap.grid for tap in teacher.taps.values() if tap.spatial is not None)  # the coarsest first
    grid = max((grid for grid in grids if grid[0] * FINEST_STRIDE <= teacher.size[0]), default=grids[0])

    def places(batch: Batch) -> Features:
        answers = teacher(batch.to(device).pixels(teacher.size)).values()
        maps = [_resize(features.to_map(), grid) for features in answers if features.spatial is not None]
        return Features.from_map(torch.cat(maps, 1))

    return places


def _resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), averaged where that is coarser."""
    if maps.shape[2] > grid[0]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False) if maps.shape[2:] != grid else maps
