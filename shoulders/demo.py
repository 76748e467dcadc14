"""The demo: the method in minutes on a laptop, from drawn scenes to a page, with nothing to download.

Four tiny teachers that ship with the package are distilled into one student on scenes without labels. Then all tasks
are evaluated: by the teachers' own heads on the student, by probes on the student and on its base, and by the same
architecture trained from scratch with labels. A demo that is started again continues: finished parts are kept.
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
from shoulders.evaluation.evaluate import evaluate
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.model import save_student
from shoulders.report import write_report
from shoulders.report.results import KINDS as TITLES
from shoulders.storage.atomic import write_folder, write_text
from shoulders.tasks import TASKS
from shoulders.tasks.finetune import HParams
from shoulders.teachers import Teachers, load_teacher
from shoulders.training.preflight import check_run
from shoulders.training.student import init_student
from shoulders.training.supervised_baseline import train_supervised_baseline
from shoulders.world import SIZE, TEACHER_TASKS, TEACHERS, write_world

Row = dict[str, Any]
THREADS = 1  # on every machine: another number of threads adds in another order, and small models gain next to nothing
EVALUATION_PROCESSES = 2
WITHOUT_STUDENT = ("scratch", "base_probe")  # kinds that can be measured before the student is trained
WITH_STUDENT = ("student_probe", "teacher_head", "teacher")
BASELINE_CANDIDATES = (HParams("muon", 2e-3),)
# kind of a measurement -> title of its column
KINDS = {kind: TITLES[kind] for kind in ("teacher", "teacher_head", "student_probe", "base_probe", "scratch")}


@dataclass(frozen=True)
class DemoSettings:
    """The size of a demo.

    Args:
        scenes: labelled scenes of each style, by split.
        steps: of the distillation.
        batch: images per step of the distillation.
        calibration_images: as in a recipe.
        holdout: as in a recipe.
        step_fraction: of the usual number of steps of a probe.
        baseline_steps: steps of the training from scratch, by the teacher whose task it is. The four trainings together
            cost the training FLOPs of the distillation (`shoulders.training.supervised_baseline.training_flops`).
    """

    scenes: dict[str, int]
    steps: int
    batch: int
    calibration_images: int
    holdout: int
    step_fraction: float
    baseline_steps: dict[str, int]


FULL = DemoSettings(
    scenes={"train": 300, "val": 60, "test": 200},
    steps=640,
    batch=16,
    calibration_images=256,
    holdout=128,
    step_fraction=0.5,
    baseline_steps={"classifier": 70, "detector": 62, "segmenter": 70, "instances": 60},
)
QUICK = DemoSettings(
    scenes={"train": 60, "val": 60, "test": 60},
    steps=12,
    batch=8,
    calibration_images=32,
    holdout=16,
    step_fraction=0.05,
    baseline_steps=dict.fromkeys(TEACHER_TASKS, 3),
)


def demo(out: Path | str = "runs/demo", quick: bool = False) -> list[Row]:
    """Run the parts of the demo that are missing in the folder ``out``, and write its ``report.html``.

    Args:
        quick: about a minute, to see that everything works; the scores mean nothing.

    Returns:
        Rows of task, kind (a key of `KINDS`), metric and value from 0 to 1.

    Raises:
        RecipeError: the folder holds something else.
        SpaceError: the disk is full.
        Interrupted: after SIGTERM, SIGINT or SIGUSR1.
    """
    settings = QUICK if quick else FULL
    recipe = demo_recipe(Path(out), settings)
    out, resume = recipe.out, (recipe.out / "recipe.yaml").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        check_run(recipe, {}, DistContext(0, 1, this_device()), resume)
        _draw_scenes(out / "scenes", settings)
        _save_initial_student(recipe)
        with _evaluation_processes() as pool:
            initial = out / "init_student"
            jobs = [
                pool.submit(measure, out, initial, settings, *job) for job in product(WITHOUT_STUDENT, TEACHER_TASKS)
            ]
            distill(recipe, resume=resume)
            jobs += [pool.submit(measure, out, out, settings, *job) for job in product(WITH_STUDENT, TEACHER_TASKS)]
            for job in tqdm(as_completed(jobs), "evaluating", len(jobs), leave=False, disable=None):
                job.result()
        rows = [json.loads(_row_file(out, kind, name).read_text()) for name, kind in product(TEACHER_TASKS, KINDS)]
        write_text(out / "demo.json", json.dumps(rows, indent=1) + "\n")
        write_report(out, rows=rows, images=None)
    except Interrupted as stopped:
        raise Interrupted(stopped.number) from stopped  # without the hint to resume: the demo does so by itself
    finally:
        torch.set_num_threads(threads)
    return rows


def demo_recipe(out: Path, settings: DemoSettings) -> Recipe:
    """The recipe of the demo's distillation."""
    return check_recipe(
        {
            "student": {"base": str(TEACHERS / "base"), "adapter": {"kind": "conv", "width": 128}},
            # each learns from images of the style that it was trained on
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
                "holdout": settings.holdout,
            },
            "transfer": {
                "calibration_images": settings.calibration_images,
                "preserve": 0.1,
                "cosine_weight": 0.5,
                "layers": ["block1", "block3", "latent"],
            },
            "keep_heads": list(TEACHER_TASKS),
            "train": {
                "steps": settings.steps,
                "batch": settings.batch,
                "lr": 6e-3,
                "evaluate_every": max(1, settings.steps // 4),
                "save_every": max(1, settings.steps // 8),
                "log_every": max(1, settings.steps // 50),
            },
            "out": str(out),
        }
    )


def _draw_scenes(folder: Path, settings: DemoSettings) -> None:
    total = len(TEACHER_TASKS) * sum(settings.scenes.values())
    with tqdm(total=total, desc="drawing labelled scenes", unit=" scenes", leave=False, disable=None) as bar:
        write_world(folder, counts=settings.scenes, on_scene=lambda: bar.update())


def _save_initial_student(recipe: Recipe) -> None:
    """Save the student before its training: its base and its architecture can be evaluated at once."""
    folder = recipe.out / "init_student"
    if not folder.exists():
        teachers = Teachers({name: load_teacher(name, spec) for name, spec in recipe.teachers.items()})
        torch.manual_seed(recipe.train.seed)
        write_folder(folder, partial(save_student, init_student(recipe, teachers), heads={}))


@contextmanager
def _evaluation_processes() -> Iterator[ProcessPoolExecutor]:
    """Processes that evaluate during the distillation and after it; a failure does not wait for them."""
    pool = ProcessPoolExecutor(EVALUATION_PROCESSES, get_context("spawn"), _init_process)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _init_process() -> None:
    """One thread, and a lower priority than the distillation, which all else waits for; Ctrl-C ends it silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.nice(10)


def _row_file(out: Path, kind: str, teacher: str) -> Path:
    return out / "measured" / f"{kind}-{teacher}.json"


def measure(out: Path, student: Path, settings: DemoSettings, kind: str, teacher: str) -> None:
    """Save the row of one kind of measurement for a teacher's task, unless it exists.

    Args:
        student: the folder of the run or of the student that is evaluated.
    """
    file = _row_file(out, kind, teacher)
    if file.exists():
        return
    name, style, labels = TEACHER_TASKS[teacher]
    task, data = TASKS[name], out / "scenes" / style / labels
    metric: str | None = task.metric.in_heads
    rows: list[Any]
    if kind in ("teacher", "teacher_head"):
        model = teacher if kind == "teacher" else "student"
        rows = evaluate_heads(student, name, data, [model], batch=50, workers=0)
        rows = [row for row in rows if row["head"] == teacher]
    elif kind == "scratch":
        splits, steps = task.find_splits(data, "image"), settings.baseline_steps[teacher]
        rows = train_supervised_baseline(student, name, splits, steps, candidates=BASELINE_CANDIDATES)
    else:
        model, metric = kind.removesuffix("_probe"), task.metric.in_probes
        rows = evaluate(student, name, data, [model], workers=0, step_fraction=settings.step_fraction)
    value = next(row["value"] for row in rows if row["metric"] == metric)
    row = {"task": name, "kind": kind, "metric": task.metric.in_heads, "value": value, "seed": 0}
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(row) + "\n")
