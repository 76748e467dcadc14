"""Evaluate a run's student, its base and its teachers on a task, all by the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from shoulders.config.recipe import Recipe
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.evaluation.finetune_models import AdapterSettings, adapter_model
from shoulders.evaluation.models import (
    BASELINE,
    MODELS,
    STUDENTS,
    check_finetune,
    check_models,
    check_spatial,
    chosen_teachers,
    models_with_features,
    recipe_of_run,
)
from shoulders.evaluation.teacher_heads import evaluate_zero_shot
from shoulders.model import load
from shoulders.storage.results import upsert_results
from shoulders.tasks import Row, Task, check_probe, find_task
from shoulders.tasks.finetune import finetune as train_and_evaluate
from shoulders.tasks.saved_probes import Probe, save_probe

Rows = list[dict[str, Any]]
DEFAULT_ADAPTER_SETTINGS = AdapterSettings()


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
    finetune: str | None = None,
    probe: str | None = None,
    step_fraction: float = 1.0,
    adapter_settings: AdapterSettings = DEFAULT_ADAPTER_SETTINGS,
    trained_models: Mapping[str, Callable[[Any], list[Row]]] | None = None,
    on_model: Callable[[str], None] = lambda name: None,
) -> Rows:
    """Fit a probe on each model's features and evaluate it.

    Args:
        run: a run folder, or a student's folder (which has no teachers).
        task: a name in `shoulders.tasks.TASKS`.
        data: labelled images, see the ``find_splits`` of the task.
        models: any of ``student``, ``base``, ``teachers``, names of teachers, or names in ``trained_models``. Default:
            the first three; the first two where the adapter is finetuned.
        column: of the images in parquet files.
        batch: images per batch.
        workers: processes or threads that decode.
        seed: of everything that is fitted.
        size: (h, w) in px of the input of the student and its base; default: that of the student's training.
        finetune: ``adapter``: after the probe is fitted, train it and the adapter together, the base frozen
            (arXiv 2202.10054).
        probe: a larger head to fit instead of the default one, see the ``larger_probes`` of the task; it is not saved.
        step_fraction: of the usual number of steps of a probe.
        adapter_settings: of ``finetune``.
        trained_models: {name: splits -> rows} of models that are trained from labels; see
            `shoulders.training.supervised_baseline`.
        on_model: called with each model's name before it is evaluated.

    Each model's rows also replace those of the same task, data, model, metric and finetuning in ``results.json`` of the
    run folder as soon as it is evaluated, and its probe is saved in ``probes/``; neither at another size.

    Returns:
        Rows of model, task, metric, value (a fraction from 0 to 1), n, seconds, settings, data and seed.

    Raises:
        RecipeError: for a task, model or path that does not exist, or a teacher without what the task needs.
        DataError: if the student or the data cannot be used.
    """
    run, row = Path(run), find_task(task)
    check_probe(row, probe or row.probe_head.name, finetune)
    is_default = probe in (None, row.probe_head.name)
    fit_probe = row.fit_probe if is_default else row.larger_probes[str(probe)]
    models = models or (STUDENTS if finetune else MODELS)
    recipe, trained_models = recipe_of_run(run), trained_models or {}
    _check(models, recipe, finetune, trained_models)
    teachers = chosen_teachers(run, recipe, models)
    splits = row.find_splits(data, column)
    check_spatial(teachers, row)
    keep = partial(_keep, run if size is None and recipe else None, data, seed)
    rows: Rows = []
    for name, px, features_of in models_with_features(run, models, teachers, row.needs_spatial, size):
        on_model(name)
        heads: list[nn.Module] = []
        model_rows = fit_probe(
            features_of, splits, px, batch, workers, seed, on_head=heads.append, step_fraction=step_fraction
        )
        fitted = Probe(task, name, splits.classes, px, heads[0])
        if finetune:
            model_rows, fitted = _finetune(run, row, fitted, model_rows, splits, batch, workers, seed, adapter_settings)
        rows += keep(name, model_rows, fitted if is_default else None)
    for name in (name for name in models if name in trained_models):
        on_model(name)
        rows += keep(name, trained_models[name](splits), None)
    if not finetune:
        rows += evaluate_zero_shot(run, row, data, splits, models, teachers, batch, workers, size)
    return rows


def _check(
    models: Sequence[str], recipe: Recipe | None, finetune: str | None, trained_models: Mapping[str, Any]
) -> None:
    """Refuse models that are not in the run, that cannot be finetuned, or that nothing trains."""
    check_models(models, recipe)
    check_finetune(finetune, models)
    if BASELINE in models and BASELINE not in trained_models:
        raise RecipeError(
            f"--models: {BASELINE} is trained by shoulders.training.supervised_baseline; call its "
            "evaluate_with_baseline instead"
        )


def _keep(run: Path | None, data: Path | str, seed: int, name: str, model_rows: list[Row], probe: Probe | None) -> Rows:
    """The rows of a model with its name, data and seed; in a run folder, they and the probe are saved."""
    rows = [{"model": name, **row, "data": str(Path(data).resolve()), "seed": seed} for row in model_rows]
    if run is not None:
        upsert_results(run / "results.json", rows)
        if probe is not None:
            save_probe(run, probe)
    return rows


def _finetune(
    run: Path,
    row: Task,
    probe: Probe,
    probe_rows: list[Row],
    splits: Any,
    batch: int,
    workers: int,
    seed: int,
    adapter_settings: AdapterSettings,
) -> tuple[list[Row], Probe]:
    """Train a fitted probe and the adapter together; the new rows, and the probe with its adapter."""
    student, task = load(run).to(this_device()), row.finetune(splits)
    values = {one["metric"]: one["value"] for one in probe_rows}
    settings: dict[str, float | int | str] = {
        "finetune": "adapter",
        "probe_value": values.get(row.metric.in_probes, 0.0),
    }
    build = partial(adapter_model, student, probe.model, probe.head)
    schedule = adapter_settings.schedule(len(splits.train.indices), splits.val is not None)
    rows, model = train_and_evaluate(build, task, probe.size, schedule, batch, workers, seed, settings)
    adapter = model.encoder.get_submodule("adapter").state_dict()
    return rows, replace(probe, head=model.head, adapter=adapter)
