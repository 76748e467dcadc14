"""What a distillation will take: seconds, memory, disk and hours, from a few real steps of it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shoulders.config.recipe import Recipe, as_recipe
from shoulders.distillation import ASKED_AT_ONCE, Run, prepare
from shoulders.distributed.context import init_distributed
from shoulders.distributed.device import environment, peak_memory_gib, use_bf16
from shoulders.errors import DataError, RecipeError, SpaceError
from shoulders.feature_cache import CachedTeachers, estimate_cache
from shoulders.features import Batch
from shoulders.hub.fast import int8_available
from shoulders.planning import size
from shoulders.planning.advice import LEAST, Facts, suggestions
from shoulders.planning.watch import (
    DECODE,
    FORWARD,
    REST,
    TEACHER,
    TRANSFER,
    Seconds,
    Turn,
    Watch,
    in_bf16,
    medians,
    seconds_of,
    seconds_to_decode,
    steps,
    watched,
    whole,
)
from shoulders.storage.atomic import free_bytes
from shoulders.teachers import Teacher, Teachers, load_teacher
from shoulders.training.heldout import MAX_TOKENS
from shoulders.training.int8_check import check_int8
from shoulders.training.preflight import check_training, check_writable
from shoulders.transfer.fvu import fvu
from shoulders.transfer.projectors import ProjectorMLP

NONE: Mapping[str, Teacher] = {}
MOST_VIEWS = 4  # that a cache is suggested with
LATER = 1000  # a step whose images nobody has read yet


def plan(recipe: Recipe | Path | str, *, own: Mapping[str, Teacher] = NONE) -> dict[str, Any]:
    """What distilling a recipe will take, from a few real steps of it; nothing of them stays.

    Args:
        recipe: a recipe, or its file.
        own: as in `shoulders.distillation.distill`.

    Returns:
        step_s, images_per_s, parts, decode, memory, disk, hours, storing (what a cache would take) and suggestions.

    Raises:
        RecipeError: the recipe cannot work, or there are several processes.
        DataError: as `shoulders.distillation.distill`.
    """
    recipe = as_recipe(recipe)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise RecipeError(f"plan: measures one process, not {processes}; start it without torchrun")
    with init_distributed() as dist:
        check_training(recipe, own, dist)
        check_writable("out", recipe.out)
        check_int8(recipe, dist.log)
        return _measure(prepare(recipe, own, dist), recipe, own)


def _measure(run: Run, recipe: Recipe, own: Mapping[str, Teacher]) -> dict[str, Any]:
    compiled, run.forward = run.forward, run.learner  # nothing can be counted or watched in what is compiled
    memory = _fit(run)
    run.dist.log("measuring a few steps")
    step, parts, bf16 = _time(run, compiled)
    decode = seconds_to_decode(run, LATER) if recipe.images.workers else parts[DECODE]
    if memory["accumulate"] == recipe.train.accumulate:
        memory["peak_bytes"] = round(peak_memory_gib() * 2**30) + size.heldout_bytes(run)
    hours, disk = _hours(run, step, parts, decode), _disk(run)
    storing = _storing(run, recipe, own, parts, step)
    facts = Facts(
        recipe,
        step,
        parts,
        decode,
        environment()["cpus"],
        memory["peak_bytes"],
        memory["available_bytes"],
        memory["accumulate"],
        run.student.config.projector_width,
        _ladder(run),
        storing,
        bf16,
        _in_int8(run, parts, step),
    )
    return {
        "step_s": step,
        "images_per_s": recipe.train.batch / step,
        "parts": [{"part": part, "s": s, "share": s / step} for part, s in parts.items()],
        "decode": {"s_per_batch": decode, "workers": recipe.images.workers},
        "memory": memory,
        "disk": disk,
        "hours": hours,
        "cache_estimate": storing,
        "suggestions": [asdict(one) for one in suggestions(facts)],
    }


def _fit(run: Run) -> dict[str, Any]:
    """What memory the run takes, as far as that can be counted; from here on its steps are such as fit."""
    train, there = run.recipe.train, size.memory_there(run.dist.device)
    per_image = size.bytes_per_image(run)
    held = peak_memory_gib() * 2**30 + size.heldout_bytes(run)
    fits = size.parts_that_fit(train, held, per_image, there)
    run.recipe = size.changed(run.recipe, accumulate=fits)
    counted = round(held + per_image * train.batch / train.accumulate)
    return {"of": run.dist.device.type, "peak_bytes": counted, "available_bytes": there, "accumulate": fits}


def _time(run: Run, compiled: Any) -> tuple[float, Seconds, float | None]:
    """Seconds of a whole step, of the parts of one, and of one in bf16 without its loader where that may help."""
    watch = Watch(run.dist.device)
    turns: list[Turn] = [partial(whole, run, compiled), partial(watched, run, watch)]
    live = not isinstance(run.teachers, CachedTeachers)  # a cache is of one precision
    may_help = live and not run.teachers.bf16 and use_bf16("auto", run.dist.device)
    plain, in_parts, *others = steps(run, watch, [*turns, partial(in_bf16, run)] if may_help else turns)
    parts = medians(in_parts)
    parts[REST] = parts.pop(REST)  # last
    return median(sum(row.values()) for row in plain), parts, medians(others[0])[REST] if others else None


def _hours(run: Run, step: float, parts: Seconds, decode: float) -> dict[str, float]:
    """Of all steps, of the questions before the first, and of the held-out measures."""
    recipe, count = run.recipe, len(run.images.heldout)
    train, workers = recipe.train, recipe.images.workers
    few = _batch(run).split(ASKED_AT_ONCE)[0]
    teach = seconds_of(lambda: list(run._taught(iter([few]))), run.dist.device) / len(few)
    draw = decode / train.batch / max(1, workers)
    questions = count + (recipe.transfer.calibration_images if recipe.transfer.standardize != "none" else 0)
    answers = count * (parts[FORWARD] + parts[TRANSFER]) / train.batch + _seconds_to_score(run)
    seconds = {
        "steps": train.steps * step,
        "before": questions * (max(teach, draw) if workers else teach + draw),
        "measures": (1 + math.ceil(train.steps / train.evaluate_every)) * answers,
    }
    return {name: s / 3600 for name, s in (seconds | {"total": sum(seconds.values())}).items()}


def _seconds_to_score(run: Run) -> float:
    """Of what fvu takes once all have answered: of random numbers of the same shapes."""
    count, d = len(run.images.heldout), run.student.encoder.width
    h, w = run.student.encoder.grid(run.size)
    many = {"summary": 1, "spatial": min(MAX_TOKENS, h * w)}
    start = time.perf_counter()
    for widths in run.student.config.taps.values():
        for part, width in widths.items():
            if width:
                fvu(torch.randn(count, many[part], d), torch.randn(count, many[part], width))
    return time.perf_counter() - start


def _disk(run: Run) -> dict[str, int]:
    """Bytes that the run will leave, those of the cache that it reads, and those that are free."""
    train, teachers = run.recipe.train, run.teachers
    checkpoint, kept = (
        size.checkpoint_bytes(run),
        min(train.keep_checkpoints, math.ceil(train.steps / train.save_every)),
    )
    student = size.student_bytes(run)
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoints": kept,
        "student_bytes": student,
        "run_bytes": kept * checkpoint + student,
        "cache_bytes": size.cache_bytes(teachers) if isinstance(teachers, CachedTeachers) else 0,
        "free_bytes": free_bytes(run.recipe.out),
    }


def _storing(
    run: Run, recipe: Recipe, own: Mapping[str, Teacher], parts: Seconds, step: float
) -> dict[str, Any] | None:
    """What a cache would take; None where the recipe wants or needs none, or it cannot be."""
    if isinstance(run.teachers, CachedTeachers) or recipe.cache.mode == "off":
        return None
    asking = sum(s for part, s in parts.items() if part.startswith(TEACHER))
    if recipe.cache.path is None and asking < LEAST * step:
        return None
    epochs = round(recipe.train.steps * recipe.train.batch / len(run.images))
    views = min(MOST_VIEWS, max(1, epochs)) if recipe.images.views == "fresh" else recipe.images.views
    path = recipe.cache.path or Path("caches") / recipe.out.name
    cached = recipe.model_copy(
        update={
            "images": recipe.images.model_copy(update={"views": views}),
            "cache": recipe.cache.model_copy(update={"path": path}),
        }
    )
    run.dist.log(f"asking what a cache of {views} views would take")
    try:
        return estimate_cache(cached, extra_teachers=own) | {"views": views}
    except (RecipeError, DataError, SpaceError) as error:
        run.dist.log(f"no cache: {error}")
        return None


def _in_int8(run: Run, parts: Seconds, step: float) -> dict[str, float]:
    """Seconds of a step that teachers would take in int8, of those that take some and can be."""
    teachers = run.teachers
    if isinstance(teachers, CachedTeachers) or not int8_available():
        return {}
    told, batch = {}, _batch(run)
    for name, spec in run.recipe.teachers.items():
        now = parts.get(TEACHER + name, 0.0)
        if spec.model is None or spec.int8 or now < LEAST * step:
            continue
        quick = load_teacher(name, spec.model_copy(update={"int8": True}))
        exact_s, quick_s = (
            seconds_of(partial(Teachers({name: teacher}, bf16=teachers.bf16), batch), run.dist.device)
            for teacher in (teachers[name], quick)
        )
        told[name] = now * quick_s / exact_s
    return told


def _ladder(run: Run) -> float:
    """Share of the projectors' weights that read other places than the latent."""
    rungs = [part for part in run.student.projectors.modules() if isinstance(part, ProjectorMLP)]
    below = [layer for one in rungs for place, layer in one.first.items() if place != "latent"]
    every = [run.student.projectors, *([run.learner.t2s] if run.learner.t2s is not None else [])]
    weights, whole = (sum(p.numel() for part in parts for p in part.parameters()) for parts in (below, every))
    return weights / whole


def _batch(run: Run) -> Batch:
    """As many images as a part of a step has."""
    train = run.recipe.train
    with closing(run._batches(LATER, LATER + 1, 0, 1)) as stream:
        return next(stream).to(run.dist.device).split(train.batch // train.accumulate)[0]
