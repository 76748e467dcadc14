"""Evaluate a run's student, its base and its teachers on a task, all by the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    CONCATENATED,
    MODELS,
    STUDENTS,
    EvaluatedModel,
    check_finetune,
    check_models,
    check_spatial,
    chosen_teachers,
    models_with_features,
    recipe_of_run,
    skip_limit,
    teachers_side_by_side,
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
    max_unreadable: float | None = None,
    trained_models: Mapping[str, Callable[[Any], list[Row]]] | None = None,
    on_model: Callable[[str], None] = lambda name: None,
) -> Rows:
    """Fit a probe on each model's features and evaluate it.

    The rows of a model are saved in ``results.json`` of the run folder as soon as it is evaluated, in place of those of
    the same task, data, model, metric and finetuning, and its default probe in ``probes/``; neither at another size.
    No probe of ``concatenated`` is saved.

    Args:
        run: a run folder, or a student's folder (which has no teachers).
        task: a name in `shoulders.tasks.TASKS`.
        data: labelled images, see the ``find_splits`` of the task; ``column`` is their name in parquet files.
        models: ``student``, ``base``, ``teachers``, teachers by name, ``concatenated`` (the features of all teachers
            side by side), or names in ``trained_models``; default: the first three, or the first two with ``finetune``.
        batch: images per batch; ``workers`` processes or threads decode; ``seed`` is that of all fits.
        size: (h, w) in px of the input of the student and its base; default: that of the student's training.
        finetune: ``adapter``: train the fitted probe and the adapter together, by ``adapter_settings``.
        probe: one of the ``larger_probes`` of the task instead of the default one; ``step_fraction`` shortens the fit.
        max_unreadable: maximum fraction of unreadable images in a split; default: that of the run's recipe.
        trained_models: {name: splits -> rows} of models that are trained from labels.
        on_model: called with each model's name before it is evaluated.

    Returns:
        Rows of model, task, metric, value (a fraction from 0 to 1), n, seconds, settings, data and seed.

    Raises:
        RecipeError, DataError: if an argument, the student or the data cannot be used.
    """
    run, row, trained_models = Path(run), find_task(task), trained_models or {}
    models, recipe = models or (STUDENTS if finetune else MODELS), recipe_of_run(run)
    check_probe(row, probe or row.probe_head.name, finetune)
    _check(models, recipe, finetune, trained_models)
    teachers = chosen_teachers(run, recipe, models)
    side_by_side = teachers_side_by_side(run, recipe, models, row)
    splits = row.find_splits(data, column)
    check_spatial(teachers, row)
    keep = partial(_keep, run if size is None and recipe else None, data, seed)
    fit = _Fit(run, row, splits, batch, workers, seed, finetune, adapter_settings, probe, step_fraction)
    rows: Rows = []
    with skip_limit(recipe, max_unreadable):
        for model in models_with_features(run, models, teachers, side_by_side, row.needs_spatial, size):
            on_model(model.name)
            rows += keep(model.name, *fit.evaluate(model))
        for name in (name for name in models if name in trained_models):
            on_model(name)
            rows += keep(name, trained_models[name](splits), None)
        if not finetune:
            rows += evaluate_zero_shot(run, row, data, splits, models, teachers, batch, workers, size)
    return rows


@dataclass(frozen=True)
class _Fit:
    """How every model of an evaluation is fitted; the arguments of `evaluate`."""

    run: Path
    task: Task
    splits: Any
    batch: int
    workers: int
    seed: int
    finetune: str | None
    adapter_settings: AdapterSettings
    probe: str | None
    step_fraction: float

    def evaluate(self, model: EvaluatedModel) -> tuple[list[Row], Probe | None]:
        """The rows of a model, and its probe if that is to be saved."""
        is_default = self.probe in (None, self.task.probe_head.name)
        fit_probe = self.task.fit_probe if is_default else self.task.larger_probes[str(self.probe)]
        heads: list[nn.Module] = []
        rows = fit_probe(
            model.features_of,
            self.splits,
            model.sizes,
            self.batch,
            self.workers,
            self.seed,
            on_head=heads.append,
            step_fraction=self.step_fraction,
            **({"widths": model.widths} if model.widths else {}),
        )
        rows = [Row(**{**row, "settings": row["settings"] | model.settings}) for row in rows]
        probe = Probe(self.task.name, model.name, self.splits.classes, model.sizes[0], heads[0])
        if self.finetune:
            rows, probe = self.finetune_adapter(rows, probe)
        return rows, probe if is_default and model.name != CONCATENATED else None

    def finetune_adapter(self, probe_rows: list[Row], probe: Probe) -> tuple[list[Row], Probe]:
        """Train a fitted probe and the adapter together; the new rows, and the probe with its adapter."""
        student, task = load(self.run).to(this_device()), self.task.finetune(self.splits)
        values = {row["metric"]: row["value"] for row in probe_rows}
        settings: dict[str, float | int | str] = {
            "finetune": "adapter",
            "probe_value": values.get(self.task.metric.in_probes, 0.0),
        }
        build = partial(adapter_model, student, probe.model, probe.head)
        schedule = self.adapter_settings.schedule(len(self.splits.train.indices), self.splits.val is not None)
        rows, model = train_and_evaluate(
            build, task, probe.size, schedule, self.batch, self.workers, self.seed, settings
        )
        adapter = model.encoder.get_submodule("adapter").state_dict()
        return rows, replace(probe, head=model.head, adapter=adapter)


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
