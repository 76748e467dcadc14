"""Measure a run's student, its base and its teachers on a task, all by the same code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from shoulders.config.recipe import TeacherSpec, read_recipe
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.evaluation.finetune_models import tuned, tuning_plan
from shoulders.evaluation.probes import Probe, save_probe
from shoulders.inference import (
    FeaturesOf,
    HeadInput,
    features_of_student,
    features_of_teacher,
    has_classes,
    input_size,
    teacher_head_on_student,
)
from shoulders.model import load
from shoulders.storage.results import upsert_results
from shoulders.tasks import TASKS, Row, Splits
from shoulders.tasks.finetune import run as train_and_score
from shoulders.tasks.teacher_head_eval import HEADS
from shoulders.tasks.transformer_probes import DEFAULT, PROBES, check_probe
from shoulders.teachers import check_teacher, load_teacher
from shoulders.teachers.heads import ZeroShot, load_head
from shoulders.teachers.heads.post_process import check_processor, task_of
from shoulders.training.supervised_baseline import check_countable, scratch

WHO = ("student", "base", "teachers")
OWN = ("student", "base")  # who has an adapter that can be tuned
Rows = list[dict[str, Any]]


def evaluate(
    run: Path | str,
    task: str,
    data: Path | str,
    models: Sequence[str] | None = None,
    *,
    column: str = "image",
    batch: int = 64,
    workers: int = 1,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    tune: str | None = None,
    scratch_steps: int | None = None,
    probe: str | None = None,
    effort: float = 1.0,
    on_model: Callable[[str], None] = lambda name: None,
) -> Rows:
    """Rows of model, task, metric, value (a fraction from 0 to 1), n, seconds and settings.

    Args:
        run: a run folder, or a student's folder (then there are no teachers to ask).
        task: a name in ``shoulders.tasks.TASKS``.
        data: labelled images; see ``find_splits``, ``find_masks`` and ``find_objects`` in ``shoulders.tasks``.
        models: any of ``student``, ``base``, ``teachers``, a teacher's name, or ``scratch``: the student's architecture
            trained from nothing with these labels (`shoulders.training.supervised_baseline`). Default: all but that one; where the adapter
            is tuned, the two that have one.
        size: (h, w) in px of what the student and its base see; default: that of the student's training.
        tune: ``adapter``: go on from the fitted probe and train it and the adapter together, the base frozen
            (arXiv 2202.10054).
        scratch_steps: of ``scratch``; default: as many as cost what the run's distillation did.
        probe: a transformers head to fit in place of the small default one, ``upernet`` for semantic,
            ``rt_detr_v2`` for detection, ``mask2former`` for instance; it is not kept.
        effort: share of the steps that the small default heads are fitted for.
        on_model: called with each model's name before it is measured.

    Each model's rows also replace those of the same task, data, model, metric and tuning in ``results.json`` of the run
    folder as soon as it is measured, and its probe is kept in ``probes/``; not so at another size.

    Raises:
        RecipeError: for a task, model or path that does not exist, or a teacher without what the task needs.
        DataError: if the student or the data cannot be used.
    """
    run = Path(run)
    if task not in TASKS:
        raise RecipeError(f"--task: {task!r} is not one of {', '.join(TASKS)}")
    check_probe(task, probe or DEFAULT[task], tune)
    measure, is_default = PROBES.get(task, {}).get(probe or "", TASKS[task].run), probe in (None, DEFAULT[task])
    models = models or (OWN if tune else WHO)
    asked = _asked(run, models, tune, scratch_steps)
    splits = TASKS[task].find(data, column)
    if TASKS[task].spatial:
        _check_spatial(asked, task)
    keep = partial(_keep, run if size is None and (run / "recipe.yaml").is_file() else None, data, seed)
    rows: Rows = []
    for name, seen_at, features_of in _chosen(run, models, asked, TASKS[task].spatial, size):
        on_model(name)
        heads: list[nn.Module] = []
        measured = measure(features_of, splits, [seen_at], batch, workers, seed, on_head=heads.append, effort=effort)
        fitted = Probe(task, name, splits.classes, seen_at, heads[0])
        if tune:
            measured, fitted = _tuned(run, fitted, measured, splits, batch, workers, seed)
        rows += keep(name, measured, fitted if is_default else None)
    if "scratch" in models:
        on_model("scratch")
        rows += keep("scratch", scratch(run, task, splits, scratch_steps, size=size, workers=workers, seed=seed), None)
    if task == "classification" and tune is None:
        rows += _zero_shot(run, data, splits, models, asked, batch, workers, size)
    return rows


def _zero_shot(
    run: Path,
    data: Path | str,
    splits: Splits,
    models: Sequence[str],
    asked: Mapping[str, TeacherSpec],
    batch: int,
    workers: int,
    size: tuple[int, int] | None,
) -> Rows:
    """Rows of kept heads that classify by class names, where these are the names of the data."""
    names = splits.test.images.classes
    rows: Rows = []
    for who, head, fed in _heads(run, {name: spec for name, spec in asked.items() if spec.classes}, models, size):
        if isinstance(fed.head, ZeroShot) and has_classes(fed, names):
            measured = HEADS["classification"](replace(fed, names=names), splits, batch, workers)
            rows += [
                {
                    "model": who,
                    "head": head,
                    **row,
                    "metric": f"zero_shot_{row['metric']}",
                    "data": str(Path(data).resolve()),
                    "seed": 0,
                }
                for row in measured
            ]
    if rows and size is None and (run / "recipe.yaml").is_file():
        upsert_results(run / "results.json", rows)
    return rows


def evaluate_heads(
    run: Path | str,
    task: str,
    data: Path | str,
    models: Sequence[str] = WHO,
    *,
    column: str = "image",
    batch: int = 64,
    workers: int = 1,
    size: tuple[int, int] | None = None,
    on_model: Callable[[str], None] = lambda name: None,
) -> Rows:
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
    rows: Rows = []
    unfit: list[str] = []
    specs = _asked(run, models, heads=True)
    for name, head, fed in _heads(run, specs, models, size):
        if isinstance(fed.head, ZeroShot) and task == "classification":
            if not has_classes(fed, splits.test.images.classes):
                continue
            fed = replace(fed, names=splits.test.images.classes)
        if task_of(fed.head) == task:
            check_processor(fed.head)
            on_model(f"{name}, head of {head}")
            try:
                told = HEADS[task](fed, splits, batch, workers)
            except RecipeError as error:  # of other classes than the data, before anything is shown to it
                unfit.append(f"{name}, head of {head}: {error}")
                continue
            new = [{"model": name, "head": head, **row, "data": str(Path(data).resolve()), "seed": 0} for row in told]
            if is_run and size is None:
                upsert_results(run / "results.json", new)
            rows += new
    if not rows:
        raise RecipeError(
            f"--heads: none of these heads answers {task} with the classes of the data; name teachers in keep_heads: "
            "of the recipe" + "".join(f"; {why}" for why in unfit)
        )
    for why in unfit:
        warnings.warn(f"left out: {why}", stacklevel=2)
    return rows


def _heads(
    run: Path, specs: Mapping[str, TeacherSpec], models: Sequence[str], size: tuple[int, int] | None = None
) -> Iterator[tuple[str, str, HeadInput]]:
    """(who gives the features, whose head it is, both together)."""
    device = this_device()
    student = load(run).to(device)
    seen_at = input_size(student, size)
    for name in student.heads if "student" in models else ():
        yield "student", name, teacher_head_on_student(student, name, seen_at)
    for name, spec in specs.items():
        if name in student.heads and ("teachers" in models or name in models):
            teacher = load_teacher(name, spec).to(device)
            head = load_head(name, spec, teacher).to(device)
            yield name, name, HeadInput(head, teacher.size, lambda x, teacher=teacher: teacher(x.to(device)))  # type: ignore[misc]


def _asked(
    run: Path, models: Sequence[str], tune: str | None = None, scratch_steps: int | None = None, heads: bool = False
) -> dict[str, TeacherSpec]:
    """The teachers to measure, or those of kept ``heads``; refuses who is not there, or cannot be tuned or counted."""
    recipe = read_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None
    specs = recipe.teachers if recipe else {}
    known = (*WHO, "scratch", *specs)
    if unknown := [name for name in models if name not in known]:
        raise RecipeError(f"--models: {', '.join(unknown)} not here; choose from {', '.join(known)}")
    if tune not in (None, "adapter"):
        raise RecipeError(f"--tune: {tune!r} is not there; adapter is all that can be tuned")
    if tune and (fixed := [name for name in models if name not in OWN]):
        raise RecipeError(f"--tune: {', '.join(fixed)} without an adapter to tune; choose --models from student, base")
    if "scratch" in models and scratch_steps is None:
        check_countable(run)
    asked = {name: spec for name, spec in specs.items() if "teachers" in models or name in models}
    if recipe and heads:
        asked = {name: spec for name, spec in asked.items() if name in recipe.keep_heads}
    for name, spec in asked.items():
        try:
            check_teacher(name, spec)
        except RecipeError as error:
            raise RecipeError(
                f"{run / 'recipe.yaml'}: {error}; go where the run was started, or leave it out: --models student,base"
            ) from error
    return asked


def _keep(run: Path | None, data: Path | str, seed: int, name: str, measured: list[Row], probe: Probe | None) -> Rows:
    """The rows of a model with what they are of; where there is a run folder, they and the probe are kept in it."""
    rows = [{"model": name, **row, "data": str(Path(data).resolve()), "seed": seed} for row in measured]
    if run is not None:
        upsert_results(run / "results.json", rows)
        if probe is not None:
            save_probe(run, probe)
    return rows


def _tuned(
    run: Path, probe: Probe, frozen: list[Row], splits: Any, batch: int, workers: int, seed: int
) -> tuple[list[Row], Probe]:
    """Rows of a probe and an adapter that learn on together from where the frozen probe ended, and both of them."""
    student, goal = load(run).to(this_device()), TASKS[probe.task].tune(splits)
    before = {row["metric"].removeprefix("linear_"): row["value"] for row in frozen}
    told: dict[str, float | int | str] = {"tune": "adapter", "frozen": before.get(goal.metric, 0.0)}
    make = partial(tuned, student, probe.model, probe.head)
    plan = tuning_plan(len(splits.train.indices), splits.val is not None)
    rows, trainee = train_and_score(make, goal, probe.size, plan, batch, workers, seed, told)
    adapter = trainee.encoder.get_submodule("adapter").state_dict()
    return rows, replace(probe, head=trainee.head, adapter=adapter)


def _check_spatial(teachers: Mapping[str, TeacherSpec], task: str) -> None:
    """Refuse a teacher that says nothing of places, before any model is measured."""
    for name, spec in teachers.items():
        if all(tap.spatial is None for tap in load_teacher(name, spec).taps.values()):
            raise RecipeError(f"teachers.{name}: has no spatial features, which {task} needs; leave it out of --models")


def _chosen(
    run: Path, models: Sequence[str], teachers: Mapping[str, TeacherSpec], spatial: bool, size: tuple[int, int] | None
) -> Iterator[tuple[str, tuple[int, int], FeaturesOf]]:
    """(name, input size, features of a batch) for each model asked for; one is in memory at a time."""
    device = this_device()
    for name in models:
        if name in ("student", "base"):
            student = load(run).to(device)
            seen_at = input_size(student, size)
            yield name, seen_at, features_of_student(student, seen_at, base=name == "base")
    for name, spec in teachers.items():
        teacher = load_teacher(name, spec).to(device)
        yield name, teacher.size, features_of_teacher(teacher, spatial)
