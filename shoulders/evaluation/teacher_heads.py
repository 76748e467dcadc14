"""Evaluate teachers' heads, on the features of their teachers and on those of the student; nothing is fitted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoulders.config.sections import TeacherSpec
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.evaluation.models import MODELS, check_models, chosen_teachers, recipe_of_run, skip_limit
from shoulders.evaluation.published import PublishedHead, load_published_head
from shoulders.inference import HeadInput, has_classes, head_on_student, head_on_teacher, input_size
from shoulders.model import load
from shoulders.storage.results import upsert_results
from shoulders.tasks import Row, Task, find_task, task_of_head
from shoulders.tasks.class_match import ClassMap
from shoulders.tasks.data.class_names import read_class_map
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import ZeroShot, load_head
from shoulders.teachers.heads.post_process import check_processor

Rows = list[dict[str, Any]]


def evaluate_heads(
    run: Path | str,
    task: str,
    data: Path | str,
    models: Sequence[str] = MODELS,
    *,
    column: str = "image",
    batch: int = 64,
    workers: int = 1,
    size: tuple[int, int] | None = None,
    classes: Path | str | None = None,
    max_unreadable: float | None = None,
    on_model: Callable[[str], None] = lambda name: None,
) -> Rows:
    """Evaluate the heads that do a task, on the features of their teachers and of the student.

    Scores are of the classes that head and data have in common; a warning names those that are left out.

    Args:
        models: ``student``: all heads that it keeps; ``teachers``, names of teachers: those of their heads that the
            student keeps.
        classes: a file that gives the head's class for classes of the data, see `read_class_map`; default:
            ``classes.json`` in the folder of the data, for images with one class each.

    The other arguments are those of `shoulders.evaluation.evaluate.evaluate`.

    Returns:
        Rows as of `shoulders.evaluation.evaluate.evaluate`, with ``head``.

    Raises:
        RecipeError: as `shoulders.evaluation.evaluate.evaluate`, or no head does the task.
        DataError: if the student, a head or the data cannot be used.
    """
    run, row = Path(run), find_task(task)
    recipe = recipe_of_run(run)
    check_models(models, recipe, MODELS)
    class_map, splits = _class_map(row, data, classes), row.find_splits(data, column, fit=False)
    teachers = chosen_teachers(run, recipe, models, with_heads=True)
    rows: Rows = []
    refused: list[str] = []
    for name, teacher, head in _heads(run, teachers, models, size):
        if task_of_head(head.head) != task:
            continue
        check_processor(head.head)
        on_model(f"{name}, head of {teacher}")
        if isinstance(head.head, ZeroShot) and has_classes(head, splits.classes):
            head = replace(head, names=splits.classes)
        try:
            with skip_limit(recipe, max_unreadable):
                head_rows = row.evaluate_head(replace(head, class_map=class_map), splits, batch, workers)
        except RecipeError as error:  # its classes are not those of the data
            refused.append(f"{name}, head of {teacher}: {error}")
            continue
        rows += _keep(run if size is None and recipe else None, data, name, teacher, head_rows)
    if not rows:
        raise RecipeError(
            f"--heads: no head does {task} with the classes of the data; name teachers in keep_heads: of the recipe"
            + "".join(f"; {reason}" for reason in refused)
        )
    for reason in (*refused, *_classes_left_out(rows)):
        warnings.warn(f"left out: {reason}", stacklevel=2)
    return rows


def _class_map(task: Task, data: Path | str, file: Path | str | None) -> ClassMap:
    """The classes in a file, or in the ``classes.json`` of images with one class each; empty where there is none."""
    beside = Path(data) / "classes.json"
    if file is None and (task.needs_spatial or not beside.is_file()):  # masks have their names in that file
        return {}
    return read_class_map(Path(file or beside))


def _classes_left_out(rows: Rows) -> list[str]:
    """One line for each head that is evaluated on some of the classes alone."""
    lines = {
        row[
            "head"
        ]: f"classes that head and data do not share: {row['settings']['classes_left_out']}; classes that the "
        f"head of {row['head']} is scored on: {row['settings']['classes']}"
        for row in rows
        if "classes_left_out" in row["settings"]
    }
    return list(lines.values())


def evaluate_zero_shot(
    run: Path,
    task: Task,
    data: Path | str,
    splits: Any,
    models: Sequence[str],
    teachers: Mapping[str, TeacherSpec],
    batch: int,
    workers: int,
    size: tuple[int, int] | None,
) -> Rows:
    """Rows of kept heads that choose among class names, if the task is theirs and they keep the names of the data."""
    rows: Rows = []
    with_names = {name: spec for name, spec in teachers.items() if spec.classes}
    for name, teacher, head in _heads(run, with_names, models, size) if task.zero_shot else ():
        names = splits.test.images.classes
        if isinstance(head.head, ZeroShot) and has_classes(head, names):
            head_rows = task.evaluate_head(replace(head, names=names), splits, batch, workers)
            renamed = [Row(**{**row, "metric": f"zero_shot_{row['metric']}"}) for row in head_rows]
            rows += _keep(None, data, name, teacher, renamed)
    if rows and size is None and (run / "recipe.yaml").is_file():
        upsert_results(run / "results.json", rows)
    return rows


def _heads(
    run: Path, teachers: Mapping[str, TeacherSpec], models: Sequence[str], size: tuple[int, int] | None
) -> Iterator[tuple[str, str, HeadInput | PublishedHead]]:
    """(the model whose features, the teacher whose head, the head with its input).

    Teachers get their images as their own image processors draw them, the student whole at its own size.
    """
    device = this_device()
    student = load(run).to(device)
    px = input_size(student, size)
    for name in student.heads if "student" in models else ():
        yield "student", name, head_on_student(student, name, px)
    for name, spec in teachers.items():
        if name in student.heads:
            yield name, name, load_published_head(name, spec, device) or _head_on_teacher(name, spec)


def _head_on_teacher(name: str, spec: TeacherSpec) -> HeadInput:
    """A teacher's head on whole images at the teacher's size, where no image processor draws them otherwise."""
    teacher = load_teacher(name, spec).to(this_device())
    return head_on_teacher(load_head(name, spec, teacher).to(this_device()), teacher)


def _keep(run: Path | None, data: Path | str, name: str, teacher: str, head_rows: Sequence[Row]) -> Rows:
    """The rows of a head with its names and the data; in a run folder, they are saved."""
    rows = [{"model": name, "head": teacher, **row, "data": str(Path(data).resolve()), "seed": 0} for row in head_rows]
    if run is not None:
        upsert_results(run / "results.json", rows)
    return rows
