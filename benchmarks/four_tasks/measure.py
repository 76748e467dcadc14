"""The rows of one job: by a teacher's own head, by that head on the student, by probes, and from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import Job, Setting, name_in_rows

from shoulders.config.recipe import as_size, read_recipe
from shoulders.distillation import distill
from shoulders.distributed.device import this_device
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.features import Batch, Features, FeaturesOf
from shoulders.inference import features_of_student, head_on_teacher
from shoulders.model import load
from shoulders.tasks import TASKS
from shoulders.tasks.data.labelled import LabelledSplit, LabelledSplits
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head
from shoulders.training.supervised_baseline import train_supervised_baseline

BATCH = 50
FIT_ON, REPORT = 5000, 2000  # images of classification that probes are fitted on, and that they report

Row = dict[str, Any]


def distilled(setting: Setting, work: Path, data: Path | None, seed: int, overrides: Sequence[str]) -> Path:
    """The run folder of a setting and seed; what is missing of the run is done."""
    run = work / setting.name / f"seed-{seed}"
    changes = [*setting.overrides(data), *overrides, f"train.seed={seed}", f"out={run}"]
    distill(read_recipe(setting.recipe, changes), resume=True)
    return run


def rows_of(job: Job, kind: str, answered: Sequence[Any], seed: int | None, probe_seed: int | None = None) -> list[Row]:
    """Rows of this benchmark out of rows of shoulders; ``low`` and ``high`` where an interval was told."""
    by_metric = {row["metric"]: row for row in answered}
    rows = []
    for metric, names in job.metrics.items():
        name = name_in_rows(names, kind)
        if name is None:
            continue
        row = by_metric[name]
        sides = {side: by_metric[f"{name}_{side}"] for side in ("low", "high") if f"{name}_{side}" in by_metric}
        rows.append(
            {
                "dataset": job.dataset,
                "task": job.task,
                "kind": kind,
                "metric": metric,
                "value": row["value"],
                **{side: told["value"] for side, told in sides.items()},
                "seed": seed,
                "probe_seed": probe_seed,
                "n": row["n"],
                "seconds": row["seconds"],
            }
        )
    return rows


def by_teacher(job: Job, setting: Setting, labels: Path) -> list[Row]:
    """The teacher itself, which no seed changes."""
    spec = read_recipe(setting.recipe).teachers[job.teacher]
    device = this_device()
    teacher = load_teacher(job.teacher, spec).to(device)
    head = head_on_teacher(load_head(job.teacher, spec, teacher).to(device), teacher)
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    return rows_of(job, "teacher", TASKS[job.task].evaluate_head(head, splits, BATCH, 0), None)


def inherited(job: Job, run: Path, labels: Path, seed: int) -> list[Row]:
    """The teacher's head on the student."""
    told = evaluate_heads(run, job.task, labels / job.labels, ["student"], batch=BATCH, workers=0)
    return rows_of(job, "teacher_head", [row for row in told if row["head"] == job.teacher], seed)


def by_probe(
    job: Job, run: Path, labels: Path, kind: str, seed: int | None, probe_seeds: Sequence[int]
) -> Iterator[list[Row]]:
    """A small head fitted on the frozen features of the student or of its base, once for each seed."""
    student = load(run).to(this_device())
    size = as_size(tuple(student.config.image_size))
    features_of = features_of_student(student, size, base=kind == "base_probe")
    if len(probe_seeds) > 1:
        features_of = remembering(features_of, summaries=not TASKS[job.task].needs_spatial)
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    splits = fewer(splits) if job.task == "classification" else splits
    for probe_seed in probe_seeds:
        told = TASKS[job.task].fit_probe(features_of, splits, size, BATCH, 0, probe_seed)
        yield rows_of(job, kind, told, seed, probe_seed)


def from_scratch(job: Job, run: Path, labels: Path, seed: int, steps: int | None) -> list[Row]:
    """The student's architecture with random weights, trained with all labels at the FLOPs of the distillation."""
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    return rows_of(job, "scratch", train_supervised_baseline(run, job.task, splits, steps, seed=seed), seed)


def fewer(splits: LabelledSplits) -> LabelledSplits:
    """At most `FIT_ON` images to fit on and `REPORT` to report, evenly out of all."""

    def thin(split: LabelledSplit, most: int) -> LabelledSplit:
        count = len(split.indices)
        return split.take(np.linspace(0, count, min(most, count), endpoint=False).astype(np.int64))

    return replace(splits, train=thin(splits.train, FIT_ON), test=thin(splits.test, REPORT))


def remembering(features_of: FeaturesOf, summaries: bool) -> FeaturesOf:
    """The same answers, computed once for each batch: fits of several seeds ask for the same ones again.

    Args:
        summaries: only these are asked for, so that places need not be kept.
    """
    known: dict[tuple[int, ...], Features] = {}

    def remembered(batch: Batch) -> Features:
        ids = tuple(batch.ids.tolist())
        if ids not in known:
            with torch.no_grad():
                said = features_of(batch)
            known[ids] = Features(said.summary, None) if summaries and said.summary is not None else said
        return known[ids]

    return remembered
