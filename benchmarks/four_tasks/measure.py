"""The rows of one job: the teacher, the teacher head on the student, probes, and training from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import Job, Setting, name_in_rows

from shoulders.config.recipe import read_recipe
from shoulders.config.section import as_size
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
MAX_TRAIN_IMAGES, MAX_TEST_IMAGES = 5000, 2000  # of probes for classification

Row = dict[str, Any]


def distill_setting(setting: Setting, work: Path, data: Path | None, seed: int, overrides: Sequence[str]) -> Path:
    """Distill the student of a setting and seed, or resume it; returns the run folder."""
    run = work / setting.name / f"seed-{seed}"
    changes = [*setting.overrides(data), *overrides, f"train.seed={seed}", f"out={run}"]
    distill(read_recipe(setting.recipe, changes), resume=True)
    return run


def make_rows(job: Job, kind: str, scores: Sequence[Any], seed: int | None, probe_seed: int | None = None) -> list[Row]:
    """Rows of this benchmark from rows of shoulders, with ``low`` and ``high`` where these have an interval."""
    by_metric = {row["metric"]: row for row in scores}
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
                **{side: bound["value"] for side, bound in sides.items()},
                "seed": seed,
                "probe_seed": probe_seed,
                "n": row["n"],
                "seconds": row["seconds"],
            }
        )
    return rows


def evaluate_teacher(job: Job, setting: Setting, labels: Path) -> list[Row]:
    """Scores of the teacher, which do not depend on a seed."""
    spec = read_recipe(setting.recipe).teachers[job.teacher]
    device = this_device()
    teacher = load_teacher(job.teacher, spec).to(device)
    head = head_on_teacher(load_head(job.teacher, spec, teacher).to(device), teacher)
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    return make_rows(job, "teacher", TASKS[job.task].evaluate_head(head, splits, BATCH, 0), None)


def evaluate_teacher_head(job: Job, run: Path, labels: Path, seed: int) -> list[Row]:
    """Scores of the teacher head on the student."""
    scores = evaluate_heads(run, job.task, labels / job.labels, ["student"], batch=BATCH, workers=0)
    return make_rows(job, "teacher_head", [row for row in scores if row["head"] == job.teacher], seed)


def evaluate_probes(
    job: Job, run: Path, labels: Path, kind: str, seed: int | None, probe_seeds: Sequence[int]
) -> Iterator[list[Row]]:
    """Scores of a probe on the frozen features of the student or of its base, for each probe seed."""
    student = load(run).to(this_device())
    size = as_size(tuple(student.config.image_size))
    features_of = features_of_student(student, size, base=kind == "base_probe")
    if len(probe_seeds) > 1:
        features_of = cache_features(features_of, summaries_only=not TASKS[job.task].needs_spatial)
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    splits = subsample(splits) if isinstance(splits, LabelledSplits) else splits
    for probe_seed in probe_seeds:
        scores = TASKS[job.task].fit_probe(features_of, splits, [size], BATCH, 0, probe_seed)
        yield make_rows(job, kind, scores, seed, probe_seed)


def evaluate_from_scratch(job: Job, run: Path, labels: Path, seed: int, steps: int | None) -> list[Row]:
    """Scores of the student's architecture trained from scratch with all labels, at the FLOPs of the distillation."""
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    return make_rows(job, "scratch", train_supervised_baseline(run, job.task, splits, steps, seed=seed), seed)


def subsample(splits: LabelledSplits) -> LabelledSplits:
    """At most `MAX_TRAIN_IMAGES` images for training and `MAX_TEST_IMAGES` for testing, evenly spaced."""

    def take_evenly(split: LabelledSplit, max_images: int) -> LabelledSplit:
        count = len(split.indices)
        return split.take(np.linspace(0, count, min(max_images, count), endpoint=False).astype(np.int64))

    return replace(
        splits, train=take_evenly(splits.train, MAX_TRAIN_IMAGES), test=take_evenly(splits.test, MAX_TEST_IMAGES)
    )


def cache_features(features_of: FeaturesOf, summaries_only: bool) -> FeaturesOf:
    """The same function, which computes the features of each batch once: probes of several seeds need the same ones.

    Args:
        features_of: the function.
        summaries_only: drop spatial features, to save memory.
    """
    cache: dict[tuple[int, ...], Features] = {}

    def cached(batch: Batch) -> Features:
        ids = tuple(batch.ids.tolist())
        if ids not in cache:
            with torch.no_grad():
                features = features_of(batch)
            drop = summaries_only and features.summary is not None
            cache[ids] = Features(features.summary, None) if drop else features
        return cache[ids]

    return cached
