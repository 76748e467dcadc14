"""Estimate a distillation from a few real steps of it: seconds, memory, disk and hours."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shoulders.config.recipe import Recipe, as_recipe
from shoulders.distillation import Trainer, prepare
from shoulders.distributed.context import init_distributed
from shoulders.distributed.device import environment, peak_memory_gib, use_bf16
from shoulders.errors import DataError, RecipeError, SpaceError
from shoulders.feature_cache import CachedTeachers, estimate_cache
from shoulders.features import Batch
from shoulders.hub.fast import int8_available
from shoulders.planning import size
from shoulders.planning.advice import MIN_SAVING, Measurements, suggestions
from shoulders.planning.watch import (
    DECODE,
    FORWARD,
    REST,
    TEACHER,
    TRANSFER,
    Seconds,
    StepFunction,
    StopWatch,
    measure_steps,
    medians,
    seconds_of,
    seconds_to_decode,
    timed,
)
from shoulders.storage.atomic import free_bytes
from shoulders.teachers import Teacher, Teachers, load_teacher
from shoulders.training.batches import MAX_IMAGES
from shoulders.training.heldout import MAX_TOKENS
from shoulders.training.int8_check import check_int8
from shoulders.training.masked import check_finite, masked_images
from shoulders.training.preflight import check_training, check_writable
from shoulders.training.step import TrainStep
from shoulders.transfer.fvu import fvu
from shoulders.transfer.projectors import ProjectorMLP

NO_TEACHERS: Mapping[str, Teacher] = {}
MAX_VIEWS = 4  # of a suggested cache
LATER_STEP = 1000  # a step whose images are not in the file cache of the system


def plan(
    recipe: Recipe | Path | str,
    *,
    extra_teachers: Mapping[str, Teacher] = NO_TEACHERS,
    available_bytes: int | None = None,
) -> dict[str, Any]:
    """Estimate what distilling a recipe takes, from a few real steps; they leave nothing behind.

    Args:
        recipe: a recipe, or its file.
        extra_teachers: as in `shoulders.distillation.distill`.
        available_bytes: of memory; default: all that this machine, its GPU or the container has.

    Returns:
        step_s, images_per_s, parts, decode, memory, disk, hours, cache_estimate and suggestions.

    Raises:
        RecipeError: the recipe cannot work, or there are several processes.
        DataError: as `shoulders.distillation.distill`.
        NumericError: the features of a teacher are not finite for most images.
    """
    recipe, processes = as_recipe(recipe), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise RecipeError(f"plan: measures one process, not {processes}; start it without torchrun")
    with init_distributed() as dist:
        check_training(recipe, extra_teachers, dist)
        check_writable("out", recipe.out)
        check_int8(recipe, dist.log)
        trainer = prepare(recipe, extra_teachers, dist)
        _check_teachers(trainer)
        available = size.memory_bytes(dist.device) if available_bytes is None else available_bytes
        return _measure(trainer, extra_teachers, available)


def _check_teachers(trainer: Trainer) -> None:
    """Refuse a teacher whose features are not finite: its part of a step would be measured without images."""
    batch = _micro_batch(trainer, trainer.step).split(MAX_IMAGES)[0]
    masked = masked_images(trainer.step.teacher_features(batch), batch, trainer.teachers.sources)
    check_finite(masked, batch, trainer.images.collection.name_of_id)


def _measure(trainer: Trainer, extra_teachers: Mapping[str, Teacher], available: int) -> dict[str, Any]:
    recipe = trainer.recipe
    memory = _memory(trainer, available)
    fits = memory["accumulate"] == recipe.train.accumulate
    step = trainer.step if fits else replace(trainer.step, accumulate=memory["accumulate"])
    trainer.dist.log("measuring a few steps")
    step_s, parts, bf16_s = _time(trainer, step)
    decode_s = seconds_to_decode(trainer.batches, LATER_STEP) if recipe.images.workers else parts[DECODE]
    if fits:
        memory["peak_bytes"] = round(peak_memory_gib() * 2**30) + size.heldout_bytes(trainer)
    batch = _micro_batch(trainer, step)
    hours, disk = _hours(trainer, batch, step_s, parts, decode_s), _disk(trainer)
    cache = _cache(trainer, extra_teachers, parts, step_s)
    measured = Measurements(
        recipe,
        step_s,
        parts,
        decode_s,
        environment()["cpus"],
        memory["peak_bytes"],
        memory["available_bytes"],
        memory["accumulate"],
        trainer.student.config.projector_width,
        _block_share(trainer),
        cache,
        bf16_s,
        _int8_seconds(trainer, batch, parts, step_s),
    )
    return {
        "step_s": step_s,
        "images_per_s": recipe.train.batch / step_s,
        "parts": [{"part": part, "s": s, "share": s / step_s} for part, s in parts.items()],
        "decode": {"s_per_batch": decode_s, "workers": recipe.images.workers},
        "memory": memory,
        "disk": disk,
        "hours": hours,
        "cache_estimate": cache,
        "suggestions": [asdict(one) for one in suggestions(measured)],
    }


def _memory(trainer: Trainer, available: int) -> dict[str, Any]:
    """Memory of the run, as far as it can be counted, and the micro-batches with which a step fits."""
    train = trainer.recipe.train
    per_image = size.bytes_per_image(trainer.step, trainer.batches)
    held = peak_memory_gib() * 2**30 + size.heldout_bytes(trainer)
    return {
        "of": trainer.dist.device.type,
        "peak_bytes": round(held + per_image * train.batch / train.accumulate),
        "available_bytes": available,
        "accumulate": size.accumulate_that_fits(train, held, per_image, available),
    }


def _time(trainer: Trainer, step: TrainStep) -> tuple[float, Seconds, float | None]:
    """Seconds of a whole step, of its parts, and of one in bf16 without its loader where that may be faster."""
    watch = StopWatch(trainer.dist.device)
    steps: list[StepFunction] = [step, timed(step, watch)]
    teachers = trainer.teachers
    # a cache has one precision
    if isinstance(teachers, Teachers) and not teachers.bf16 and use_bf16("auto", trainer.dist.device):
        steps.append(replace(step, teachers=teachers.with_bf16(True), compile=False))
    whole, in_parts, *in_bf16 = measure_steps(steps, trainer.batches, watch)
    parts = medians(in_parts)
    parts[REST] = parts.pop(REST)  # last
    return median(sum(row.values()) for row in whole), parts, medians(in_bf16[0])[REST] if in_bf16 else None


def _hours(trainer: Trainer, batch: Batch, step_s: float, parts: Seconds, decode_s: float) -> dict[str, float]:
    """Hours of all steps, of the teachers' forward passes before the first step, and of the evaluations."""
    recipe, heldout = trainer.recipe, len(trainer.images.heldout)
    train, workers = recipe.train, recipe.images.workers
    few = batch.split(MAX_IMAGES)[0]
    teacher_s = seconds_of(partial(trainer.step.teacher_features, few), trainer.dist.device) / len(few)
    image_s = decode_s / train.batch / max(1, workers)
    images = heldout + (recipe.transfer.calibration_images if recipe.transfer.standardize != "none" else 0)
    evaluation_s = heldout * (parts[FORWARD] + parts[TRANSFER]) / train.batch + _seconds_to_score(trainer)
    seconds = {
        "steps": train.steps * step_s,
        "before": images * (max(teacher_s, image_s) if workers else teacher_s + image_s),
        "measures": (1 + math.ceil(train.steps / train.evaluate_every)) * evaluation_s,
    }
    return {name: s / 3600 for name, s in (seconds | {"total": sum(seconds.values())}).items()}


def _seconds_to_score(trainer: Trainer) -> float:
    """Seconds of all fvu of an evaluation, with random numbers of the same shapes."""
    images, d = len(trainer.images.heldout), trainer.student.encoder.width
    h, w = trainer.student.encoder.grid(trainer.batches.size)
    tokens = {"summary": 1, "spatial": min(MAX_TOKENS, h * w)}
    start = time.perf_counter()
    for dims in trainer.student.config.taps.values():
        for component, channels in dims.items():
            if channels:
                latents = torch.randn(images, tokens[component], d)
                fvu(latents, torch.randn(images, tokens[component], channels))
    return time.perf_counter() - start


def _disk(trainer: Trainer) -> dict[str, int]:
    """Bytes that the run leaves, those of the cache that it reads, and those that are free."""
    train, teachers = trainer.recipe.train, trainer.teachers
    checkpoints = min(train.keep_checkpoints, math.ceil(train.steps / train.save_every))
    checkpoint, student = size.checkpoint_bytes(trainer), size.student_bytes(trainer)
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoints": checkpoints,
        "student_bytes": student,
        "run_bytes": checkpoints * checkpoint + student,
        "cache_bytes": size.cache_bytes(teachers) if isinstance(teachers, CachedTeachers) else 0,
        "free_bytes": free_bytes(trainer.recipe.out),
    }


def _cache(
    trainer: Trainer, extra_teachers: Mapping[str, Teacher], parts: Seconds, step_s: float
) -> dict[str, Any] | None:
    """The estimate of a cache; None where the recipe excludes or does not need one, or there can be none."""
    recipe = trainer.recipe
    if isinstance(trainer.teachers, CachedTeachers) or recipe.cache.mode == "off":
        return None
    teachers_s = sum(s for part, s in parts.items() if part.startswith(TEACHER))
    if recipe.cache.path is None and teachers_s < MIN_SAVING * step_s:
        return None
    epochs = round(recipe.train.steps * recipe.train.batch / len(trainer.images))
    views = min(MAX_VIEWS, max(1, epochs)) if recipe.images.views == "fresh" else recipe.images.views
    path = recipe.cache.path or Path("caches") / recipe.out.name
    cached = recipe.model_copy(
        update={
            "images": recipe.images.model_copy(update={"views": views}),
            "cache": recipe.cache.model_copy(update={"path": path}),
        }
    )
    trainer.dist.log(f"estimating a cache of {views} views")
    try:
        return estimate_cache(cached, extra_teachers=extra_teachers) | {"views": views}
    except (RecipeError, DataError, SpaceError) as error:
        trainer.dist.log(f"no cache: {error}")
        return None


def _int8_seconds(trainer: Trainer, batch: Batch, parts: Seconds, step_s: float) -> dict[str, float]:
    """Seconds of a step that teachers would take in int8, for those that take some time and can run in it."""
    teachers = trainer.teachers
    if isinstance(teachers, CachedTeachers) or not int8_available():
        return {}
    seconds = {}
    for name, spec in trainer.recipe.teachers.items():
        now = parts.get(TEACHER + name, 0.0)
        if spec.model is None or spec.int8 or now < MIN_SAVING * step_s:
            continue
        in_int8 = load_teacher(name, spec.model_copy(update={"int8": True}))
        exact_s, int8_s = (
            seconds_of(partial(Teachers({name: teacher}, bf16=teachers.bf16), batch), trainer.dist.device)
            for teacher in (teachers[name], in_int8)
        )
        seconds[name] = now * int8_s / exact_s
    return seconds


def _block_share(trainer: Trainer) -> float:
    """Share of the projectors' weights that read other layers than the latent."""
    mlps = [module for module in trainer.student.projectors.modules() if isinstance(module, ProjectorMLP)]
    of_blocks = [linear for one in mlps for layer, linear in one.first.items() if layer != "latent"]
    t2s = trainer.module.t2s
    projectors = [trainer.student.projectors, *([t2s] if t2s is not None else [])]
    blocks, total = (sum(p.numel() for one in modules for p in one.parameters()) for modules in (of_blocks, projectors))
    return blocks / total


def _micro_batch(trainer: Trainer, step: TrainStep) -> Batch:
    """Images of one micro-batch."""
    with closing(trainer.batches.training(LATER_STEP, LATER_STEP + 1)) as stream:
        return next(stream).to(trainer.dist.device).split(trainer.recipe.train.batch // step.accumulate)[0]
