"""The embedded default: the whole idea on a laptop in minutes, from drawn scenes to a page that one can look at.

Scenes without labels are distilled from four tiny teachers that ship with the package into one student; then all four
tasks are measured: by the teachers' own heads on the student, by probes on the student and on its base, and against the
same architecture trained from nothing with labels. What is finished is kept, and a demo that is started again goes on.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distillation import distill
from shoulders.distributed.context import DistContext
from shoulders.distributed.device import this_device
from shoulders.errors import Interrupted
from shoulders.evaluation.evaluate import evaluate, evaluate_heads
from shoulders.model import save_student
from shoulders.report import write_report
from shoulders.storage.atomic import write_folder, write_text
from shoulders.tasks import TASKS
from shoulders.tasks.finetune import HParams
from shoulders.teachers import Teachers, load_teacher
from shoulders.training.preflight import check_run
from shoulders.training.student import init_student
from shoulders.training.supervised_baseline import scratch
from shoulders.world import SIZE, TEACHER_TASKS, TEACHERS, write_world

Row = dict[str, Any]
THREADS = 1  # the same everywhere: more of them add in another order; for models this small they gain next to nothing
METRICS = {"classification": "top1", "detection": "AP", "semantic": "mIoU", "instance": "mask_AP"}
PROCESSES = 2  # that measure
FIRST = ("scratch", "base_probe")  # these ask nothing of the student
LAST = ("student_probe", "inherited", "teacher")
TRIES = (HParams("muon", 2e-3),)  # of training from scratch
# what the table shows of each task, and how it calls that
KINDS = {
    "teacher": "teacher",
    "inherited": "its head on the student",
    "student_probe": "probe on the student",
    "base_probe": "on its base",
    "scratch": "from scratch, with labels",
}
PROBES = {**METRICS, "classification": "linear_top1"}  # the same numbers, as probes call them


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Args:
        scenes: with labels, of each style, by split.
        steps: of the distillation, with `batch` images each.
        probe: share of the steps that a probe usually takes.
        scratch: steps of training from nothing, by task: four trainings that together cost the training FLOPs of the
            one distillation, as `shoulders.training.supervised_baseline.equal_flops` counts them (tests/test_demo.py holds them against it).
    """

    scenes: dict[str, int]
    steps: int
    batch: int
    calibration_images: int
    holdout: int
    probe: float
    scratch: dict[str, int]


FULL = Effort(
    {"train": 300, "val": 60, "test": 200},
    640,
    16,
    256,
    128,
    0.5,
    {"classification": 70, "detection": 62, "semantic": 70, "instance": 60},
)
QUICK = Effort({"train": 60, "val": 60, "test": 60}, 12, 8, 32, 16, 0.05, dict.fromkeys(METRICS, 3))


def demo(out: Path | str = "runs/demo", quick: bool = False) -> list[Row]:
    """Run what is missing of the demo in the folder ``out``, and write its ``report.html``.

    Args:
        quick: a minute's worth, to see that everything works; its scores mean nothing.

    Returns:
        Rows of task, kind (teacher, inherited, student_probe, base_probe, scratch), metric and value from 0 to 1.

    Raises:
        RecipeError: the folder holds something else.
        SpaceError: the disk is full.
        Interrupted: after SIGTERM or SIGINT.
    """
    effort = QUICK if quick else FULL
    told = recipe(Path(out), effort)
    out, resume = told.out, (told.out / "recipe.yaml").exists()
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        check_run(told, {}, DistContext(0, 1, this_device()), resume)
        _draw(out / "scenes", effort)
        _save_newborn(told)
        with _processes() as pool:
            asked = [
                pool.submit(ask, out, out / "init_from_scratch", effort, *what)
                for what in product(FIRST, TEACHER_TASKS)
            ]
            distill(told, resume=resume)
            asked += [pool.submit(ask, out, out, effort, *what) for what in product(LAST, TEACHER_TASKS)]
            for done in tqdm(as_completed(asked), "measuring", len(asked), leave=False, disable=None):
                done.result()
        rows = [json.loads(_file(out, kind, teacher).read_text()) for teacher, kind in product(TEACHER_TASKS, KINDS)]
        write_text(out / "demo.json", json.dumps(rows, indent=1) + "\n")
        write_report(out, rows=rows, images=None)
    except Interrupted as stopped:
        raise Interrupted(stopped.number) from stopped  # a demo that is started again goes on by itself
    finally:
        torch.set_num_threads(before)
    return rows


def recipe(out: Path, effort: Effort) -> Recipe:
    """What the demo distils."""
    return check_recipe(
        {
            "student": {"base": str(TEACHERS / "base"), "adapter": {"kind": "conv", "width": 128}},
            # each is asked about the style that it knows
            "teachers": {
                name: {"model": str(TEACHERS / name), "sources": [style]}
                for name, (_, style, _) in TEACHER_TASKS.items()
            },
            "images": {
                "sources": {
                    style: {"module": "shoulders.world:unlabelled", "args": {"styles": [style], "count": 5_000}}
                    for _, style, _ in TEACHER_TASKS.values()
                },
                "size": SIZE,
                "scale": [0.6, 1.0],
                "holdout": effort.holdout,
            },
            "transfer": {
                "calibration_images": effort.calibration_images,
                "preserve": 0.1,
                "cosine_weight": 0.5,
                "layers": ["block1", "block3", "latent"],
            },
            "keep_heads": list(TEACHER_TASKS),
            "train": {
                "steps": effort.steps,
                "batch": effort.batch,
                "lr": 6e-3,
                "evaluate_every": max(1, effort.steps // 4),
                "save_every": max(1, effort.steps // 8),
                "log_every": max(1, effort.steps // 50),
            },
            "out": str(out),
        }
    )


def _draw(folder: Path, effort: Effort) -> None:
    total = len(TEACHER_TASKS) * sum(effort.scenes.values())
    with tqdm(total=total, desc="drawing scenes with labels", unit=" scenes", leave=False, disable=None) as bar:
        write_world(folder, counts=effort.scenes, on_scene=lambda: bar.update())


def _save_newborn(told: Recipe) -> None:
    """The student before it learned anything: enough for all that is not asked of a student, which need not wait."""
    if not (told.out / "init_from_scratch").exists():
        teachers = Teachers({name: load_teacher(name, spec) for name, spec in told.teachers.items()})
        torch.manual_seed(told.train.seed)
        write_folder(told.out / "init_from_scratch", partial(save_student, init_student(told, teachers), heads={}))


@contextmanager
def _processes() -> Iterator[ProcessPoolExecutor]:
    """Processes that measure, beside the distillation and after it; a failure does not wait for them."""
    pool = ProcessPoolExecutor(PROCESSES, get_context("spawn"), _give_way)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _give_way() -> None:
    """One thread each, and the distillation, which all else waits for, goes first; Ctrl-C ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.nice(10)


def _file(out: Path, kind: str, teacher: str) -> Path:
    """Where a row is kept."""
    return out / "measured" / f"{kind}-{teacher}.json"


def ask(out: Path, student: Path, effort: Effort, kind: str, teacher: str) -> None:
    """Measure one row, unless it is there: what a kind of measurement says of a teacher's task."""
    file = _file(out, kind, teacher)
    if file.exists():
        return
    task, style, labels = TEACHER_TASKS[teacher]
    data = out / "scenes" / style / labels
    if kind in ("teacher", "inherited"):
        who = teacher if kind == "teacher" else "student"
        rows = evaluate_heads(student, task, data, [who], batch=50, workers=0)
        told = [row for row in rows if row["head"] == teacher]
        metric = METRICS[task]
    elif kind == "scratch":
        steps = effort.scratch[task]
        told = scratch(student, task, TASKS[task].find(data, "image"), steps, tries=TRIES)  # type: ignore[assignment]
        metric = METRICS[task]
    else:
        told = evaluate(student, task, data, [kind.removesuffix("_probe")], workers=0, effort=effort.probe)
        metric = PROBES[task]
    value = next(row["value"] for row in told if row["metric"] == metric)
    row = {"task": task, "kind": kind, "metric": METRICS[task], "value": value, "seed": 0}
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(row) + "\n")
