"""Measure a run's student, its base and its teachers on a task, all by the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from shoulders.errors import RecipeError
from shoulders.features import Batch, Features
from shoulders.journal import keep_rows
from shoulders.model import load
from shoulders.ranks import this_device
from shoulders.recipe import as_size, read_recipe
from shoulders.tasks import TASKS, find_splits
from shoulders.teachers import Teacher, load_teacher

WHO = ("student", "base", "teachers")
FeaturesOf = Callable[[Batch], Features]


def evaluate(
    run: Path | str, task: str, data: Path | str, models: Sequence[str] = WHO, *, column: str = "image",
    batch: int = 64, workers: int = 1, seed: int = 0, on_model: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of model, task, metric, value (a fraction from 0 to 1), n, seconds and settings.

    Args:
        run: a run folder, or a student's folder (then there are no teachers to ask).
        task: a name in ``shoulders.tasks.TASKS``.
        data: labelled images; see ``shoulders.tasks.find_splits``.
        models: any of ``student``, ``base``, ``teachers``, or a teacher's name.
        on_model: called with each model's name before it is measured.

    The rows also replace those of the same task, data, model and metric in ``results.json`` of the run folder.

    Raises:
        RecipeError: for a task, model or path that does not exist.
        DataError: if the student or the data cannot be used.
    """
    run = Path(run)
    if task not in TASKS:
        raise RecipeError(f"--task: {task!r} is not one of {', '.join(TASKS)}")
    splits = find_splits(data, column)
    rows = []
    for name, size, features_of in _chosen(run, models):
        on_model(name)
        for row in TASKS[task](features_of, splits, [size], batch, workers, seed):
            rows.append({"model": name, **row, "data": str(Path(data).resolve()), "seed": seed})
    if (run / "recipe.yaml").is_file():
        keep_rows(run / "results.json", rows)
    return rows


def _chosen(run: Path, models: Sequence[str]) -> Iterator[tuple[str, tuple[int, int], FeaturesOf]]:
    """(name, input size, features of a batch) for each model asked for; one is in memory at a time."""
    specs = read_recipe(run / "recipe.yaml").teachers if (run / "recipe.yaml").is_file() else {}
    unknown = [name for name in models if name not in (*WHO, *specs)]
    if unknown:
        raise RecipeError(f"--models: {', '.join(unknown)} not here; choose from {', '.join((*WHO, *specs))}")
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
    for name, spec in specs.items():
        if "teachers" in models or name in models:
            teacher = load_teacher(name, spec).to(device)
            yield name, teacher.size, _of_teacher(teacher, device)


def _of_teacher(teacher: Teacher, device: torch.device) -> FeaturesOf:
    """A teacher's last tap: the summary where it has one, else its spatial features."""
    last = list(teacher.taps)[-1]
    return lambda batch: teacher(batch.to(device).pixels(teacher.size))[last]
