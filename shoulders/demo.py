"""The embedded default: the whole idea on a laptop in minutes, from drawn scenes to a page that one can look at.

Scenes without labels are distilled from four tiny teachers that ship with the package into one student; then all four
tasks are measured: by the teachers' own heads on the student, by probes on the student and on its base, and against the
same architecture trained from nothing with labels. What is finished is kept, and a demo that is started again goes on.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shoulders.checkpoint import write_text
from shoulders.distill import distill
from shoulders.evaluate import evaluate, evaluate_heads
from shoulders.recipe import Recipe, check_recipe
from shoulders.report import write_report
from shoulders.scratch import scratch
from shoulders.tasks import TASKS
from shoulders.tasks.tuned import Try
from shoulders.world import SIZE, TASKS_OF, TEACHERS, write_world

Row = dict[str, Any]
THREADS = 1  # the same everywhere: more of them add in another order; for models this small they gain next to nothing
METRICS = {"classification": "top1", "detection": "AP", "semantic": "mIoU", "instance": "mask_AP"}
PROCESSES = 2  # that measure
LONGEST_FIRST = ("scratch", "student_probe", "base_probe", "inherited", "teacher")
TRIES = (Try("muon", 2e-3),)  # of training from scratch
# what the table shows of each task, and how it calls that
KINDS = {"teacher": "teacher", "inherited": "its head on the student", "student_probe": "probe on the student",
         "base_probe": "on its base", "scratch": "from scratch, with labels"}  # fmt: skip
# the same numbers under the names that heads and probes have for them
HEADS = {**METRICS, "instance": "AP"}
PROBES = {**METRICS, "classification": "linear_top1"}


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Args:
        scenes: with labels, of each style, by split.
        steps: of the distillation, with `batch` images each.
        probe: share of the steps that a probe usually takes.
        scratch: steps of training from nothing, by task: four trainings that together cost the training FLOPs of the
            one distillation, as `shoulders.scratch.equal_flops` counts them (tests/test_demo.py holds them against it).
    """

    scenes: dict[str, int]
    steps: int
    batch: int
    calibration: int
    holdout: int
    probe: float
    scratch: dict[str, int]


FULL = Effort({"train": 300, "val": 60, "test": 200}, 480, 16, 256, 64, 0.25,
              {"classification": 77, "detection": 68, "semantic": 77, "instance": 65})  # fmt: skip
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
    """
    out, effort = Path(out), QUICK if quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        _draw(out / "scenes", effort)
        distill(recipe(out, effort), resume=(out / "recipe.yaml").exists())
        rows = _measure(out, effort)
        write_report(out, rows=rows, images=None)
    finally:
        torch.set_num_threads(before)
    return rows


def recipe(out: Path, effort: Effort) -> Recipe:
    """What the demo distils."""
    return check_recipe({
        "student": {"base": str(TEACHERS / "base"), "adapter": {"kind": "conv", "width": 128}},
        "teachers": {name: {"model": str(TEACHERS / name)} for name in TASKS_OF},
        "images": {
            "sources": {"world": {"module": "shoulders.world:unlabelled", "args": {"count": 20_000}}},
            "size": SIZE, "scale": [0.6, 1.0], "holdout": effort.holdout,
        },
        "transfer": {
            "calibration": effort.calibration, "preserve": 0.1, "cosine_share": 0.5,
            "reads": ["block1", "block3", "latent"],
        },
        "keep_heads": list(TASKS_OF),
        "train": {
            "steps": effort.steps, "batch": effort.batch, "lr": 6e-3, "evaluate_every": max(1, effort.steps // 4),
            "save_every": max(1, effort.steps // 8), "log_every": max(1, effort.steps // 50),
        },
        "out": str(out),
    })  # fmt: skip


def _draw(folder: Path, effort: Effort) -> None:
    total = len(TASKS_OF) * sum(effort.scenes.values())
    with tqdm(total=total, desc="drawing scenes with labels", unit=" scenes", leave=False, disable=None) as bar:
        write_world(folder, counts=effort.scenes, on_scene=lambda: bar.update())


def _measure(out: Path, effort: Effort) -> list[Row]:
    """All rows, each kept as soon as it is there; measured by two processes of one thread, which disturb nobody."""
    file = out / "demo.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    there = {(row["task"], row["kind"]) for row in rows}
    order = [(teacher, kind) for kind in sorted(KINDS, key=LONGEST_FIRST.index) for teacher in TASKS_OF]
    missing = [(teacher, kind) for teacher, kind in order if (TASKS_OF[teacher][0], kind) not in there]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        asked = [pool.submit(ask, out, effort, teacher, kind) for teacher, kind in missing]
        for done in tqdm(as_completed(asked), "measuring", len(asked), leave=False, disable=None):
            rows.append(done.result())
            write_text(file, json.dumps(rows, indent=1) + "\n")
    tasks = [task for task, _, _ in TASKS_OF.values()]
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), list(KINDS).index(row["kind"])))


def ask(out: Path, effort: Effort, teacher: str, kind: str) -> Row:
    """One row: what a kind of measurement says of a teacher's task."""
    task, style, labels = TASKS_OF[teacher]
    data = out / "scenes" / style / labels
    if kind in ("teacher", "inherited"):
        who = teacher if kind == "teacher" else "student"
        told = [row for row in evaluate_heads(out, task, data, [who], batch=50, workers=0) if row["head"] == teacher]
        metric = HEADS[task]
    elif kind == "scratch":
        steps = effort.scratch[task]
        told = scratch(out, task, TASKS[task].find(data, "image"), steps, tries=TRIES)  # type: ignore[assignment]
        metric = METRICS[task]
    else:
        told = evaluate(out, task, data, [kind.removesuffix("_probe")], workers=0, effort=effort.probe)
        metric = PROBES[task]
    value = next(row["value"] for row in told if row["metric"] == metric)
    return {"task": task, "kind": kind, "metric": METRICS[task], "value": value, "seed": 0}
