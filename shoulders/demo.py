"""The embedded default: the whole idea on a laptop in minutes, from drawn scenes to a page that one can look at.

Scenes without labels are distilled from four tiny teachers that ship with the package into one student; then all four
tasks are measured: by the teachers' own heads on the student, by probes on the student and on its base, and against the
same architecture trained from nothing with labels. What is finished is kept, and a demo that is started again goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shoulders.checkpoint import write_text
from shoulders.distill import distill
from shoulders.evaluate import evaluate, evaluate_heads
from shoulders.recipe import Recipe, check_recipe
from shoulders.report import write_report
from shoulders.world import SIZE, TASKS_OF, TEACHERS, write_world

Row = dict[str, Any]
THREADS = 2  # the same everywhere: another number of them adds in another order, and scores would differ a little
METRICS = {"classification": "top1", "detection": "AP", "semantic": "mIoU", "instance": "mask_AP"}
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


FULL = Effort({"train": 300, "val": 60, "test": 200}, 1000, 8, 512, 64, 0.25,
              {"classification": 100, "detection": 100, "semantic": 100, "instance": 100})  # fmt: skip
QUICK = Effort({"train": 24, "val": 8, "test": 16}, 20, 8, 32, 16, 0.05, dict.fromkeys(METRICS, 4))


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
            "steps": effort.steps, "batch": effort.batch, "lr": 3e-3, "evaluate_every": max(1, effort.steps // 4),
            "save_every": max(1, effort.steps // 8), "log_every": max(1, effort.steps // 50),
        },
        "out": str(out),
    })  # fmt: skip


def _draw(folder: Path, effort: Effort) -> None:
    total = len(TASKS_OF) * sum(effort.scenes.values())
    with tqdm(total=total, desc="drawing scenes with labels", unit=" scenes", leave=False, disable=None) as bar:
        write_world(folder, counts=effort.scenes, on_scene=lambda: bar.update())


def _measure(out: Path, effort: Effort) -> list[Row]:
    """All rows; each is kept as soon as it is there."""
    file = out / "demo.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    there = {(row["task"], row["kind"]) for row in rows}
    missing = [(task, kind, ask) for task, kind, ask in _questions(out, effort) if (task, kind) not in there]
    bar = tqdm(missing, unit=" measures", leave=False, disable=None)
    for task, kind, ask in bar:
        bar.set_description(f"{task}, {kind.replace('_', ' ')}")
        rows.append({"task": task, "kind": kind, "metric": METRICS[task], "value": ask()})
        write_text(file, json.dumps(rows, indent=1) + "\n")
    return rows


def _questions(out: Path, effort: Effort) -> Iterator[tuple[str, str, Callable[[], float]]]:
    """(task, kind, what measures it) of everything that the table shows."""
    for teacher, (task, style, labels) in TASKS_OF.items():
        data = out / "scenes" / style / labels
        head = partial(evaluate_heads, out, task, data, batch=50)
        probe = partial(evaluate, out, task, data, workers=0, effort=effort.probe)
        scratch = partial(evaluate, out, task, data, ["scratch"], workers=0, scratch_steps=effort.scratch[task])
        yield task, "teacher", partial(_value, partial(head, [teacher]), HEADS[task], teacher)
        yield task, "inherited", partial(_value, partial(head, ["student"]), HEADS[task], teacher)
        yield task, "student_probe", partial(_value, partial(probe, ["student"]), PROBES[task])
        yield task, "base_probe", partial(_value, partial(probe, ["base"]), PROBES[task])
        yield task, "scratch", partial(_value, scratch, METRICS[task])


def _value(measure: Callable[[], list[Row]], metric: str, head: str | None = None) -> float:
    """The one number that the table shows."""
    return next(row["value"] for row in measure() if row["metric"] == metric and row.get("head") in (head, None))
